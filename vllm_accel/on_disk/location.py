"""Where a checkpoint is: a folder, a hub id, or the method's own folder in the model."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from vllm_accel.errors import CheckpointError

FASTERDECODING = "medusa_lm_head.pt"
_FILES = ["*.json", "*.safetensors"]


def method_folder(
    method: str, given: str | None, *, base: str, revision: str | None = None
) -> Path:
    """The local folder of what a method drafts with, downloaded when it is a hub id.

    Args:
        method: names the folder beside the model's weights, such as "cerberus".
        given: folder or hub id; None looks in the model's own folder of that name.
        base: folder or hub id of the model.
        revision: of the hub repository, the checkpoint's own or the model's.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    if given is None:
        return _of_model(method, base, revision)
    if Path(given).is_dir():
        return Path(given)
    return _download(given, revision, [*_FILES, FASTERDECODING])


def model_folder(base: str, revision: str | None = None) -> Path:
    """The local folder of a model's weights, downloaded when it is a hub id.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return Path(base) if Path(base).is_dir() else _download(base, revision, _FILES)


def _of_model(method: str, base: str, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base) / method
    patterns = [f"{method}/{pattern}" for pattern in _FILES]
    return _download(base, revision, patterns) / method


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
            f"({reason}): expected a checkpoint or a model; check the name, or download "
            "it first."
        ) from error
