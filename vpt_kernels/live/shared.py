"""What conversations over one model share: its positions' state, and the patch that stays while one is open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary, finalize, ref

from torch import nn

from vpt_kernels.patch.api import patch
from vpt_kernels.patch.report import PatchReport

_MODELS: WeakKeyDictionary[nn.Module, Shared] = WeakKeyDictionary()
_OPEN = threading.Lock()


class Shared:
    """One per model. lock: held while the model runs, because `rope_deltas` is an attribute of it."""

    def __init__(self, model: nn.Module) -> None:
        self.lock = threading.RLock()
        self._model, self._users = ref(model), 0
        self._report: PatchReport | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Shared:
        with _OPEN:
            return _MODELS.setdefault(model, cls(model))

    def join(self, conversation: object, kernels: bool) -> Callable[[], object]:
        """Patch the model for the first user that wants it; the returned call, or the user's end, leaves again."""
        if not kernels:
            return lambda: None
        with _OPEN:
            # Whoever joins holds the model.
            if not self._users and (model := self._model()) is not None:
                self._report = patch(model, strict=False)
            self._users += 1
        return finalize(conversation, self._leave)

    def _leave(self) -> None:
        with _OPEN:
            self._users -= 1
            if not self._users and self._report is not None and self._model() is not None:
                self._report.unpatch()
