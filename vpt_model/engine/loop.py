"""The multi-pass loop of visual perception tokens, as the paper draws it.

    image ── look ──┐
    question ───────┴─ prefill ── decode ──┬── answer
                                    ↑      ├── region span ──── crop, look ─────────────────┐
                                    │      └── action start ─── feed it → h*, re-encode ────┤
                                    └──────────────────── append ───────────────────────────┘

The loop is a generator: it yields its events and, where it needs the model, a request, and is sent what came of it.
It feeds every token once. The control state h* and all keys and values cached before it do not depend on the new
image, so a second look is appended and nothing is prefilled again. Source: arXiv 2502.17425.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from vpt_kernels import RegionPolicy
from vpt_model.config import ENCODERS
from vpt_model.engine import perception
from vpt_model.engine.conversation import Conversation, Picture, Question, Turn
from vpt_model.engine.events import Answer, Box, Event, Look, Reencode, Region, Token
from vpt_model.engine.requests import Append, CropAndAppend, Decode, Output, ReencodeAndAppend, Request
from vpt_model.network.model import Model
from vpt_model.network.positions import mrope_positions
from vpt_model.text.prompt import PromptFormat, action_round, first_round, next_round, region_round
from vpt_model.text.tokens import Tokenizer, crop_box, parse_region_ids

NAN = "the logits behind {} tokens are NaN: check the weights, and use bfloat16 or float32 where float16 overflows"


class Loop:
    """How a question is answered; arguments as of `Engine`. model: its shapes only, nothing is computed here."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, prompt: PromptFormat, policy: RegionPolicy, keep_prefix: bool = False
    ) -> None:
        self.tokenizer, self.ids, self.prompt = tokenizer, tokenizer.ids, prompt
        self.vision, self.encoder, self.policy, self.keep_prefix = model.vision, model.encoder, policy, keep_prefix
        self.reencoder = next((name for name, kind in ENCODERS.items() if kind == self.ids.kind), "")

    def answer(self, conversation: Conversation, question: Question) -> Generator[Event | Request, Output, Answer]:
        """Decode and look again in rounds, until one ends without a look; return the answer."""
        output: Output | None = yield from self.prefill(conversation, question)
        while output is not None:
            turn = yield from self.decode(conversation, question, output)
            output = yield from self.look_again(conversation, question, turn)
        conversation.unfed, timings = question.left_over(conversation, self.ids), conversation.clock.stages
        return question.summary(self.tokenizer.decode, timings, self.keep_prefix)

    def prefill(self, conversation: Conversation, question: Question) -> Generator[Request, Output, Output]:
        """Feed the question, up to and including the assistant header; before the first one, the system's text."""
        picture, stage = question.picture, "append" if conversation.length else "prefill"
        if picture is None or picture.features is not None:
            place = self._place(conversation, self._prompt(conversation, question, None))
            output = yield Append(**place, sampler=question.next_sampler, stage=stage)
        else:
            conversation.pictures.append(picture)
            plan = perception.plan(self.vision, picture.kept, [picture.whole], self.policy, conversation.clock)
            picture.grids = plan.grids
            tokens = self._prompt(conversation, question, *self._counts(plan.grids))
            place = self._place(conversation, tokens, plan.grids) | {"picture": picture, "plan": plan}
            output = yield CropAndAppend(
                **place, pad=self.ids.image_pad, sampler=question.next_sampler, stage=stage, again=question.may_look
            )
            (picture.features,) = output.features
        conversation.unfed = ()
        question.round_start = conversation.mark()
        return output

    def _prompt(self, conversation: Conversation, question: Question, image_tokens: int | None) -> list[int]:
        if conversation.length:
            return [*conversation.unfed, *next_round(self.ids, question.user, image_tokens)]
        return first_round(self.ids, self.tokenizer.encode(self.prompt.system), question.user, image_tokens)

    def decode(
        self, conversation: Conversation, question: Question, output: Output
    ) -> Generator[Token | Request, Output, Turn]:
        """Generate until the turn ends; the token that ends it is not fed, nor are forced ones just before it.

        output: of what was fed before.
        """
        turn = question.begin_turn(conversation)
        while not turn.end:
            token = turn.forced.popleft() if turn.forced else output.token
            if token is None:
                turn.end = "nan"
                question.notices.append(NAN.format(conversation.length))
                break
            if token in self.ids.stop:
                turn.end = "stop"
            elif token == self.ids.action_start and question.may_look:
                turn.end = "action"
            elif len(turn.ids) + 1 >= question.max_new_tokens and not turn.forced:
                turn.end = "length"
            elif conversation.length + len(turn.pending(conversation)) == conversation.capacity:
                turn.end = "capacity"
            elif self.ids.action is not None and output.fed == self.ids.action_start:
                token = self.ids.action  # the models never learned to predict it
            if question.keep_logits and output.logits is not None:
                turn.logits.append(output.logits)
            yield Token(token, turn.add(token, self.tokenizer.decode))
            if not turn.end and self._is_asked(question, turn):
                # The action token's own embedding is never used: its input is the state of the token before it.
                embeds = output.hidden if token == self.ids.action else None
                sampler = None if turn.forced else question.sampler
                ahead = 0 if turn.forced else question.max_new_tokens - len(turn.ids) - 1
                tokens = turn.pending(conversation)
                output = yield Decode(
                    conversation=conversation, tokens=tokens, embeds=embeds, sampler=sampler, ahead=ahead
                )
        return turn

    def _is_asked(self, question: Question, turn: Turn) -> bool:
        """Return whether somebody needs what follows the turn's last token, or its state.

        Nobody does between forced tokens, which are fed together with what comes behind them.
        """
        action, last = self.ids.action, turn.ids[-1]
        if not turn.forced or question.keep_logits:
            return True
        return last == self.ids.action_start or action is not None and action in (last, turn.forced[0])

    def look_again(
        self, conversation: Conversation, question: Question, turn: Turn
    ) -> Generator[Event | Request, Output, Output | None]:
        """Take the look that the turn asks for; None if it asks for none, or none can be taken."""
        picture = question.picture
        if picture is None or not question.can_look_again(turn, self.encoder is not None, self.ids.region_start):
            return None
        if turn.end == "action":
            yield Reencode(self.reencoder)
            seen = yield from self._reencode(conversation, question, picture)
        elif boxes := self._named_boxes(question, turn, picture):
            yield Region(boxes)
            seen = yield from self._crop(conversation, question, turn, picture, boxes)
        else:
            return None
        if seen is None:
            return None
        look, output = seen
        question.looks.append(look)
        question.round_start = conversation.mark()
        yield look
        return output

    def _reencode(
        self, conversation: Conversation, question: Question, picture: Picture
    ) -> Generator[Request, Output, tuple[Look, Output] | None]:
        encoder = self.encoder
        count = len(picture.seen) if encoder is None else encoder.tokens
        tokens = [self.ids.action_span[0], *action_round(self.ids, count)]
        # The second round starts from the bare action span: text that led to it is forgotten.
        conversation.truncate(question.round_start)
        if not question.fits(conversation, len(tokens)):
            return None
        place = self._place(conversation, tokens) | {"picture": picture, "pad": self.ids.kind_pad}
        output = yield ReencodeAndAppend(**place, sampler=question.next_sampler)
        grids = picture.grids if encoder is None else (encoder.grid,)
        return Look(self.reencoder, (), tuple(grids), count, len(tokens)), output

    def _crop(
        self, conversation: Conversation, question: Question, turn: Turn, picture: Picture, boxes: tuple[Box, ...]
    ) -> Generator[Request, Output, tuple[Look, Output] | None]:
        plan = perception.plan(self.vision, picture.kept, boxes, self.policy, conversation.clock)
        answer = turn.ids[:-1] if turn.end == "stop" else turn.ids
        again = self.tokenizer.encode(self.tokenizer.decode(answer))
        unfed = answer[len(turn.ids) - len(turn.pending(conversation)) :]
        if again != answer:
            # The second round reads the answer's text, and that text has other ids than were generated.
            conversation.truncate(question.round_start)
            unfed = again
        counts = self._counts(plan.grids)
        shown = region_round(self.ids, counts, self.tokenizer.encode)
        if not question.fits(conversation, len(unfed) + len(shown)):
            return None
        tokens = [*(yield from self._feed_actions(conversation, unfed)), *shown]
        place = self._place(conversation, tokens, plan.grids) | {"picture": picture, "plan": plan}
        output = yield CropAndAppend(**place, pad=self.ids.image_pad, sampler=question.next_sampler)
        return Look("region", boxes, tuple(plan.grids), sum(counts), len(tokens)), output

    def _feed_actions(self, conversation: Conversation, tokens: list[int]) -> Generator[Request, Output, list[int]]:
        """Feed an answer's tokens up to the last action token among them, as `decode` feeds it; return those behind."""
        action = self.ids.action
        if action is None or action not in tokens:
            return tokens
        if tokens[0] == action:
            # Nobody has kept the state of the token before it, which is fed once more.
            back = next(n for n, token in enumerate(reversed(conversation.tokens), 1) if token != action)
            tokens, mark = [*conversation.tokens[-back:], *tokens], conversation.mark()
            conversation.truncate(mark._replace(length=mark.length - back, next_position=mark.next_position - back))
        state: torch.Tensor | None = None
        while action in tokens:
            at = tokens.index(action)
            if at:
                output = yield Append(**self._place(conversation, tokens[:at]), logits=False)
                state = output.hidden
            output = yield Append(**self._place(conversation, [action]), embeds=state, logits=False)
            state, tokens = output.hidden, tokens[at + 1 :]
        return tokens

    def _named_boxes(self, question: Question, turn: Turn, picture: Picture) -> tuple[Box, ...]:
        if turn.end == "nan":
            return ()
        try:
            boxes = self.boxes(picture, turn.ids)
        except ValueError as error:
            if question.may_look:
                question.notices.append(f"no second look: {error}")
            return ()
        if question.may_look:
            return boxes
        if boxes and turn.end == "stop":
            turn.end = "looks"
        return ()

    def boxes(self, picture: Picture, tokens: Sequence[int]) -> tuple[Box, ...]:
        """Return the pixels of the regions that an answer names. Raises ValueError for a region that has none."""
        _, _, width, height = picture.whole
        return tuple(crop_box(span, width, height) for span in parse_region_ids(tokens, self.ids))

    def _counts(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Return how many visual tokens images of these grids are."""
        return [height * width // self.vision.config.spatial_merge_size**2 for height, width in grids]

    def _place(
        self, conversation: Conversation, tokens: Sequence[int], grids: Sequence[tuple[int, int]] = ()
    ) -> dict[str, Any]:
        """Return what every request to feed `tokens` next says: where they stand, and which position follows."""
        ids, merge = torch.tensor(tokens, device="cpu"), self.vision.config.spatial_merge_size
        positions, following = mrope_positions(ids, grids, conversation.next_position, self.ids.image_pad, merge)
        return {"conversation": conversation, "tokens": tokens, "positions": positions, "next_position": following}
