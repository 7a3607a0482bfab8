"""Where the control state h* is taken: in the worker, between the model's logits and the sampler, for marked rows.

vLLM tells its logits processors which row of the logits is whose. No more is used of them, and no logit is changed.
One class serves both model runners: V1 calls `update_state`, V2 `add_request`.
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from vpt_model.config import shown
from vpt_model.vllm.options import LOOKS, SLOT, read_options


def control_slots(vllm_config: Any) -> int:
    """Return how many control states live requests may hold at a time.

    The scheduler numbers them, the workers keep them.
    """
    return max(64, 4 * int(vllm_config.scheduler_config.max_num_seqs))


class Controls:
    """The control states of live requests: `states` [slots, H] on the model's device.

    A slot is the scheduler's: nothing is freed here, and a request that was preempted finds its state again. sampled:
    [rows, H], the states behind the logits of this step.
    """

    of: ClassVar[WeakValueDictionary[str, Controls]] = WeakValueDictionary()
    """The control states of each model of this process, by the `instance_id` of its vLLM configuration."""

    def __init__(self, vllm_config: Any, hidden_size: int) -> None:
        self.states = torch.zeros(control_slots(vllm_config), hidden_size)
        self.sampled: Tensor | None = None
        Controls.of[vllm_config.instance_id] = self

    def store(self, marked: dict[int, int]) -> None:
        """Copy rows of the step to slots, without a wait. marked: row to slot."""
        assert self.sampled is not None, "logits are computed before they are processed"
        places = torch.tensor([list(marked), list(marked.values())]).to(self.states.device, non_blocking=True)
        self.states.index_copy_(0, places[1], self.sampled.index_select(0, places[0]).to(self.states.dtype))


class ControlCapture(ProcessorV1, ProcessorV2):  # type: ignore[misc]
    """Stores the states of the rows that the scheduler has marked; one class below for each re-encoder."""

    encoder: ClassVar[str]

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse bad options where a request enters: an HTTP 400 there, and an exception in the engine core later."""
        try:
            options = read_options(sampling_params.extra_args, cls.encoder)
        except TypeError as error:  # vLLM makes 400s of ValueErrors alone
            raise ValueError(str(error)) from None
        if options.looks and sampling_params.structured_outputs is not None:
            raise ValueError(f"{LOOKS} and a grammar or JSON schema exclude each other: a look has tokens of its own")
        for name in ("kv_transfer_params", "ec_transfer_params"):  # vLLM's own, which it does not check
            value = (sampling_params.extra_args or {}).get(name, {})
            if not isinstance(value, dict):
                raise ValueError(f"{name} is {shown(value)}; it must be an object: leave it out of vllm_xargs")

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.instance = vllm_config.instance_id
        # V1: row of the batch to slot. V2: the request's index to slot.
        self.marked: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: vLLM does not call invariant processors for greedy requests."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Take the rows that came, went and moved; the first model runner calls this."""
        process_dict_updates(self.marked, batch_update, lambda params, *_: _slot(params))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request that came; return whether it is marked. The second model runner calls this."""
        self.marked.pop(req_idx, None)
        slot = _slot(sampling_params)
        if slot is not None:
            self.marked[req_idx] = slot
        return slot is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Store the marked rows; return the logits as they are. ctx: the rows of a step of V2, which reorders them."""
        marked = self.marked
        if marked and ctx is not None:
            marked = {row: marked[i] for row, i in enumerate(ctx.idx_mapping_np.tolist()) if i in marked}
        if marked:
            Controls.of[self.instance].store(marked)
        return logits


def _slot(params: Any) -> int | None:
    return (params.extra_args or {}).get(SLOT)


class ClipCapture(ControlCapture):
    """The capture for checkpoints that re-encode with their own vision tower."""

    encoder = "clip"


class DinoCapture(ControlCapture):
    """The capture for checkpoints that re-encode with DINOv2."""

    encoder = "dino"


class SamCapture(ControlCapture):
    """The capture for checkpoints that re-encode with SAM."""

    encoder = "sam"


class AlignedCapture(ControlCapture):
    """The capture for a variant's intermediate stage, whose vocabulary has no tokens of looks."""

    encoder = ""


CAPTURES = {
    kind.encoder: f"vpt_model.vllm.capture:{kind.__name__}"
    for kind in (ClipCapture, DinoCapture, SamCapture, AlignedCapture)
}
"""The classes that vLLM loads, by the re-encoder's name."""
