"""What a gate learnt, in a file, so that the next engine starts warm."""

import json
import logging
import os
import time
from pathlib import Path

from vllm_accel.errors import ConfigError
from vllm_accel.gating.policy import LearningGate

logger = logging.getLogger("vllm.vllm_accel")

_FIRST_S, _INTERVAL_S = 2.0, 10.0


class GateMemory:
    """A JSON file with a gate's state.

    Args:
        file: need not exist yet; its folder must.
        writes: whether to keep it up to date, or only to read it.
    """

    def __init__(self, file: Path, *, writes: bool) -> None:
        self._file = file
        self._writes = writes
        self._next = time.monotonic() + _FIRST_S

    def restore(self, gate: LearningGate) -> None:
        """Starts a gate from the file, if there is one.

        Raises:
            ConfigError: the file is damaged, or of another kind of gate or heads.
        """
        if not self._file.is_file():
            return
        try:
            state = json.loads(self._file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cerberus.gate_state={str(self._file)!r} cannot be read ({error}): "
                "expected the file an engine wrote, or none; delete it."
            ) from error
        gate.load_state_dict(state)
        logger.info("cerberus: the gate starts from %s", self._file)

    def save_when_due(self, gate: LearningGate) -> None:
        """Writes the file after two seconds and then every ten, between steps.

        A failure is logged and costs nothing.
        """
        now = time.monotonic()
        if not self._writes or now < self._next:
            return
        self._next = now + _INTERVAL_S
        partial = self._file.with_name(f"{self._file.name}.partial")
        try:
            partial.write_text(json.dumps(gate.state_dict()))
            os.replace(partial, self._file)
        except OSError as error:
            logger.warning("cerberus: gate_state could not be written: %s", error)
