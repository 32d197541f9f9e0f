"""Which heads an engine uses."""

from pathlib import Path
from typing import Any

from vllm_accel.config import CerberusConfig
from vllm_accel.on_disk import location


def folder_of(config: CerberusConfig, model_config: Any) -> Path:
    """Local folder of the heads; the model's own revision counts for its own heads only.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    revision = config.revision if config.model else model_config.revision
    return location.method_folder(
        "cerberus", config.model, base=model_config.model, revision=revision
    )
