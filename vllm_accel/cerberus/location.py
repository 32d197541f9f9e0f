"""Where heads are: a folder, a hub id, or the folder `cerberus` of the model."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from vllm_accel.errors import CheckpointError

DEFAULT_SUBFOLDER = "cerberus"
FASTERDECODING = "medusa_lm_head.pt"
_FILES = ["*.json", "*.safetensors"]


def heads_folder(heads: str | None, *, base: str, revision: str | None = None) -> Path:
    """The local folder of a user's heads, downloaded when it is a hub id.

    Args:
        heads: folder or hub id; None looks in the model's own folder `cerberus`.
        base: folder or hub id of the model.
        revision: of the hub repository, the heads' own or the model's.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    if heads is None:
        return _of_model(base, revision)
    if Path(heads).is_dir():
        return Path(heads)
    return _download(heads, revision, [*_FILES, FASTERDECODING])


def model_folder(base: str, revision: str | None = None) -> Path:
    """The local folder of a model's weights, downloaded when it is a hub id.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return Path(base) if Path(base).is_dir() else _download(base, revision, _FILES)


def _of_model(base: str, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base) / DEFAULT_SUBFOLDER
    patterns = [f"{DEFAULT_SUBFOLDER}/{pattern}" for pattern in _FILES]
    return _download(base, revision, patterns) / DEFAULT_SUBFOLDER


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repo!r} is neither a folder nor a repository that can be reached "
            f"({reason}): expected heads or a model; check the name, or download it first."
        ) from error
