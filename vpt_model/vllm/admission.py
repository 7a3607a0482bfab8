"""What a request may not ask of its own prompt, refused where it enters: an HTTP 400 before the engine core sees it.

A capture's `validate_params` sees the options alone; the check of vLLM's platforms is one that sees the prompt, too.
"""

from __future__ import annotations

from typing import Any

from vllm import platforms
from vllm.exceptions import VLLMValidationError

from vpt_model.vllm.items import IMAGE
from vpt_model.vllm.options import LOOKS


class Admission:
    """The platform's `validate_request`, which raises for what the platform refuses, and then for forced looks."""

    def __init__(self, of_platform: Any) -> None:
        self.of_platform = of_platform

    def __call__(self, processed_inputs: Any, params: Any) -> None:
        """Raise VLLMValidationError, which vLLM answers with 400, if looks are forced on a prompt without an image."""
        self.of_platform(processed_inputs, params)
        looks = (getattr(params, "extra_args", None) or {}).get(LOOKS)
        if looks and not processed_inputs.get("mm_kwargs", {}).get(IMAGE):
            raise VLLMValidationError(
                f"{LOOKS} is {looks!r:.80}, but the request has 0 images and a look needs 1: add an image to a "
                f"message, or leave {LOOKS} out",
                parameter=LOOKS,
            )


def install() -> None:
    """Put the check in place in this process; any number of calls do what one does."""
    platform = platforms.current_platform
    if not isinstance(platform.validate_request, Admission):
        platform.validate_request = Admission(platform.validate_request)
