"""A model's folder by its path or by its name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_SMALL_FILES = ["*.json", "merges.txt"]


def model_folder(model: str) -> Path:
    """Return the folder of `model`: a folder, or `owner/name@revision` on the hub (a commit, tag or branch; default:
    main).

    Files come from the hub's cache and are downloaded where it lacks them; HF_HUB_OFFLINE=1 forbids that. Only
    configuration, tokenizer and weights are fetched, pickled weights only where there are no others. The name of the
    returned folder is the commit: naming it as revision pins the model.

    Raises ValueError if there is no such folder and no such model, or if huggingface_hub is missing.
    """
    if model and Path(model).is_dir():
        return Path(model)
    match = _NAME.fullmatch(model)
    if match is None or model.startswith("."):
        raise ValueError(f"there is no folder {model}; give a checkpoint folder or a hub model as owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"there is no folder {model}, and the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error

    def fetch(patterns: list[str]) -> Path:
        options = {"revision": match["revision"], "allow_patterns": patterns}
        try:
            return Path(snapshot_download(match["name"], **options))
        except Exception:  # huggingface_hub lets the errors of its HTTP library through
            # What the cache holds needs no connection; asked for a commit, the call above wants one all the same.
            return Path(snapshot_download(match["name"], **options, local_files_only=True))

    try:
        folder = fetch([*_SMALL_FILES, "*.safetensors"])
        return folder if any(folder.glob("*.safetensors")) else fetch([*_SMALL_FILES, "pytorch_model*.bin"])
    except Exception as error:
        reason = (str(error.__context__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"there is no folder {model}, and the hub's {match['name']} (revision {match['revision'] or 'main'}) "
            f"cannot be fetched: {reason}; check the name and the connection, or download it and give its folder"
        ) from error
