"""config.json of VPT checkpoints as transformers reads it, and what an engine that serves them must be set to."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig

from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.hub import model_folder
from vpt_model.vllm import contract
from vpt_model.vllm.perception import perception_of


class VPTConfig(Qwen2VLConfig):  # type: ignore[misc]
    """The published configuration: Qwen2-VL's, and fields of the looks."""

    model_type = "qwen2_vl_vpt"

    def __post_init__(self, **kwargs: Any) -> None:
        end = kwargs.get("para_end_id")
        super().__post_init__(**kwargs)
        if end is not None:  # the published files name no end of a turn, and Qwen2-VL's may not be theirs
            self.text_config.eos_token_id, self.text_config.bos_token_id = end, None


class VRTConfig(VPTConfig):
    """The same under its older name."""

    model_type = "vrt_qwen2_vl"


CONFIGS = (VPTConfig, VRTConfig)
SCHEDULER = "vpt_model.vllm.scheduler.look_scheduler"


class LookDefaults:
    """Settings of an engine for VPT checkpoints; vLLM's `VerifyAndUpdateConfig` by its two functions."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Do nothing: what an engine must be set to is known later only."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Put scheduler and capture in place. Raises ValueError for settings that exclude second looks."""
        contract.check()
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        refused = {
            "--speculative-config": vllm_config.speculative_config is not None,
            "--pipeline-parallel-size": vllm_config.parallel_config.pipeline_parallel_size > 1,
            "--scheduler-cls": scheduler.scheduler_cls not in (None, SCHEDULER),
            # The engine core crops images, so that it needs their pixels.
            "--mm-processor-cache-type": model.get_multimodal_config().mm_processor_cache_type != "lru",
        }
        if asked := [flag for flag, is_asked in refused.items() if is_asked]:
            raise ValueError(f"second looks do not go together with {', '.join(asked)}: leave the default")
        from vpt_model.vllm.admission import install
        from vpt_model.vllm.capture import CAPTURES

        if vllm_config.load_config.load_format != "dummy":
            Checkpoint.open(model_folder(model.model))
        # vLLM's front end counts a picture as sent when it has read it: behind a request that is refused with its
        # picture, every later one with the same picture would miss it and fail. What it would save is a copy of pixels.
        model.get_multimodal_config().mm_processor_cache_gb = 0
        capture = CAPTURES[perception_of(model).encoder]
        scheduler.scheduler_cls = SCHEDULER
        others = [each for each in model.logits_processors or () if each != capture]
        model.logits_processors = [*others, capture]
        # A reasoning parser must not keep a grammar from the first token: with a grammar there is no look.
        vllm_config.structured_outputs_config.enable_in_reasoning = True
        install()
