"""vLLM's scheduler, in which a request that asks for a look goes on with more prompt; its `Conversation` says when.

The mechanism is vLLM's own for streaming input: a resumable request that stops takes its next input from a queue, and
its KV blocks stay. Here the input comes from the conversation, not from a client, and all rounds leave as one stream
of tokens.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vpt_model.text.tokens import parse_look
from vpt_model.vllm.capture import control_slots
from vpt_model.vllm.conversation import Append, Conversation, End, State
from vpt_model.vllm.items import IMAGE, PIXELS, feature, named
from vpt_model.vllm.metrics import LookTimes
from vpt_model.vllm.options import SLOT, read_options
from vpt_model.vllm.perception import perception_of

logger = init_logger(__name__)
_STATUS = {End.FULL: RequestStatus.FINISHED_LENGTH_CAPPED, End.FAILED: RequestStatus.FINISHED_ERROR}


class Looks:
    """Mixed into vLLM's schedulers. No method may raise: an exception in a scheduler ends the whole server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perception = perception_of(self.vllm_config.model_config)
        self.free_slots = list(range(control_slots(self.vllm_config)))
        self.conversations: dict[str, Conversation] = {}
        self.times = LookTimes()
        self.starved = False

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests and not request.resumable and request.sampling_params is not None:
            conversation = self._conversation(request)
            if request.use_structured_output:
                # A grammar accepts no perception token, and what it does not accept is never sampled.
                conversation.max_looks = 0
                conversation.notices.append("no second looks: the request has a grammar or a JSON schema")
            else:
                request.sampling_params = self._params(conversation)
            self.conversations[request.request_id] = conversation
        super().add_request(request)

    def _conversation(self, request: Request) -> Conversation:
        # A list of its own: where there is one process, it is shared with the other answers of `n`.
        request.mm_features = [named(each) if _has_pixels(each) else each for each in request.mm_features]
        shown = [each for each in request.mm_features if _has_pixels(each)]
        image = (shown[-1].identifier, shown[-1].data[PIXELS].data) if shown else None
        notices: list[str] = []
        looks, max_looks = deque[list[int]](), 0
        try:
            max_looks, asked = read_options(request.sampling_params.extra_args, self.perception.encoder)
            looks += [parse_look(look, self.perception.tokenizer.ids) for look in asked]
        except (TypeError, ValueError) as error:  # checked where the request entered, but for tokens that are missing
            notices.append(str(error))
        if looks and image is None:
            looks.clear()
            notices.append("no second look: the request has no image")
        if self.perception.tokenizer.ids.action in (request.prompt_token_ids or ()):
            notices.append(
                "the prompt holds an action token, which was read without the state that is its embedding: leave the "
                "tokens of earlier looks out of it"
            )
        conversation = Conversation(
            self.perception,
            request.sampling_params,
            image,
            max_looks,
            looks,
            round_start=request.num_prompt_tokens,
            capacity=self.max_model_len,
            free_slots=self.free_slots,
        )
        conversation.notices += notices
        return conversation

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, Any]:
        conversation = self.conversations.pop(request.request_id, None)
        transfer, *rest = super()._free_request(request, *args, **kwargs)
        if conversation is not None:
            self.free_slots += [slot for _, slot in conversation.slots]
            # The one dictionary of vLLM's that reaches every client in the response: `kv_transfer_params`.
            told = {"vpt_looks": conversation.looks, "vpt_notices": conversation.notices}
            if told := {name: value for name, value in told.items() if value}:
                transfer = {**(transfer or {}), **told}
        return (transfer, *rest)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM preempts running requests only. With none, those that wait for a look with their KV could block each
        # other for ever: the last one gives its blocks back.
        if self.starved:
            self._give_back()
        self._keep_features()
        output = super().schedule(*args, **kwargs)
        self.starved = not output.total_num_scheduled_tokens and not self.running and bool(self.kv_holding_waiting)
        return output

    def _keep_features(self) -> None:
        """Let the encoder cache evict last what a live conversation may still need; its size stays vLLM's."""
        unused = self.encoder_cache_manager.freeable
        for name in (each.image[0] for each in self.conversations.values() if each.image and each.may_look):
            if name in unused:
                unused.move_to_end(name)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        while reset_running_requests and self._give_back():
            pass
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _give_back(self) -> bool:
        held = [r for r in self.kv_holding_waiting if r.request_id in self.conversations and r.num_computed_tokens]
        if held:
            self.kv_holding_waiting.remove_request(held[-1])
            self._release(held[-1])
            held[-1].num_preemptions += 1
            self.waiting.prepend_request(held[-1])
        return bool(held)

    def _release(self, request: Request) -> None:
        self._free_request_blocks(request)
        self.encoder_cache_manager.free(request)
        request.num_computed_tokens = 0

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        return self.times.added_to(super().make_stats(*args, **kwargs))

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        conversation = self.conversations.get(request.request_id)
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if conversation is None or request.use_structured_output:
            return tokens, stopped
        if not conversation.turn and conversation.asked is not None and not is_stale:
            self.times.add(conversation.looks[-1]["kind"], time.monotonic() - conversation.asked)
            conversation.asked = None
        if not (stopped or conversation.is_forced):
            conversation.turn += tokens
            conversation.streamed += len(tokens)
            return tokens, stopped
        if is_stale and not conversation.ends_for_good(tokens):
            # The request was preempted meanwhile: the token is forgotten, and sampled again when the request is back.
            del request._output_token_ids[-len(tokens) :], request._all_token_ids[-len(tokens) :]
            del request.block_hashes[request.num_tokens // self.hash_block_size :]
            request.status, request.stop_reason = RequestStatus.PREEMPTED, None
            return [], False
        forced = conversation.is_forced
        answer = self._asked(conversation, tokens, request)
        if isinstance(answer, End):
            # A forced turn ends where the model would go on; what was sampled is no part of it.
            status = _STATUS.get(answer, request.status)
            request.status = status if RequestStatus.is_finished(status) else RequestStatus.FINISHED_STOPPED
            request.resumable = False
            return [] if forced else tokens, True
        tokens[:] = answer.streamed
        conversation.streamed += len(tokens)
        # Not finished for the client: no finish reason leaves with these tokens.
        request.status, request.stop_reason = RequestStatus.RUNNING, None
        request.resumable, request.streaming_queue = True, deque([answer])
        return tokens, True

    def _asked(self, conversation: Conversation, tokens: list[int], request: Request) -> Append | End:
        began, taken = time.monotonic(), len(conversation.looks)
        try:
            answer = conversation.take(tokens, request.all_token_ids)
        except Exception:
            logger.exception("the request %s ends: its look failed", request.request_id)
            return End.FAILED
        if conversation.asked is None and (conversation.state is State.CAPTURING or len(conversation.looks) > taken):
            conversation.asked = began
        for notice in conversation.notices:
            logger.warning_once("%s", notice)
        return answer

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        if not isinstance(update, Append):
            return super()._update_request_as_session(session, update)
        keep, tokens = update.keep, session._all_token_ids
        if keep == session.num_computed_tokens - 1 and tokens[keep] == update.tokens[0]:
            session.num_computed_tokens = keep  # the same token again: its keys and values do not change
        elif keep < session.num_computed_tokens:
            # Blocks behind `keep` may be in the prefix cache and must not be written to: all are given back, and those
            # before it are found again there.
            self._release(session)
            session.mm_features = [f for f in session.mm_features if f.mm_position.offset < keep]
        del tokens[keep:], session.block_hashes[keep // self.hash_block_size :]
        session._output_token_ids.clear()
        session.mm_features = [*session.mm_features, *map(feature, update.shown)]
        tokens += update.tokens
        session.prompt_token_ids = tokens.copy()
        session.num_prompt_tokens = len(tokens)
        session.update_block_hashes()
        session.sampling_params = self._params(self.conversations[session.request_id], update.slot)
        session.max_tokens = session.sampling_params.max_tokens
        session.status = RequestStatus.WAITING
        session.resumable = False

    def _params(self, conversation: Conversation, slot: int | None = None) -> Any:
        """Return the next round's sampling parameters; a captured state is followed by one token that is not used."""
        ids, params = self.perception.tokenizer.ids, conversation.params.clone()
        action = {token for token in (ids.action_start, ids.action) if token is not None}
        stop = action if params.ignore_eos else action | ids.stop
        params.stop_token_ids = sorted({*(params.stop_token_ids or ()), *stop})
        params.max_tokens = 1 if slot is not None else max(1, conversation.left)
        params.min_tokens = 0 if slot is not None else max(0, params.min_tokens - conversation.streamed)
        if slot is not None:
            params.extra_args = {**(params.extra_args or {}), SLOT: slot}
        return params


def _has_pixels(shown: Any) -> bool:
    return bool(shown.modality == IMAGE and shown.data is not None and PIXELS in shown.data)


class SyncLookScheduler(Looks, Scheduler):
    """Steps that wait for the one before."""


class AsyncLookScheduler(Looks, AsyncScheduler):
    """Steps that are planned ahead."""


def look_scheduler(vllm_config: Any, **arguments: Any) -> Looks:
    """Return the scheduler of an engine.

    This is a function, because vLLM is told the class before it decides on planning ahead.
    """
    ahead = vllm_config.scheduler_config.async_scheduling
    return (AsyncLookScheduler if ahead else SyncLookScheduler)(vllm_config, **arguments)
