"""What gates learn, shared: a replica publishes, a new one starts from all together.

A gate lives in an engine's worker and keeps its state in a file (`gate_state`). The
replica's actor reads that file and writes it before the engine starts; between replicas
stands one small named actor.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from vllm_accel.gating import calibrators, cost

logger = logging.getLogger("ray.serve")

State = Mapping[str, Any]

NAMESPACE = "vllm_accel"
KEEP = 16
"""States the board keeps, the newest: replicas that ended count until others come."""

_OPTIONS = {
    "namespace": NAMESPACE,
    "get_if_exists": True,
    "lifetime": "detached",
    "num_cpus": 0,
    # Not in the placement group of the replica that happens to make it: with that it
    # would end.
    "scheduling_strategy": "DEFAULT",
}


class GateBoard:
    """The newest gate state of every replica. Runs as an actor, is plain Python."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def publish(self, replica: str, state: State) -> None:
        """Takes a replica's state in place of its last one."""
        self._states.pop(replica, None)
        self._states[replica] = state
        for oldest in list(self._states)[:-KEEP]:
            del self._states[oldest]

    def merged(self) -> State | None:
        """All states as one; None while there are none."""
        states = list(self._states.values())
        return merged(states) if states else None


class SharedGate:
    """One replica's side of the board.

    Args:
        board: handle of the actor.
        replica: this replica's name on it.
        file: where this replica's gate keeps its state.
    """

    def __init__(self, board: Any, replica: str, file: Path) -> None:
        self._board = board
        self._replica = replica
        self._file = file
        self._seen = 0.0

    @classmethod
    def join(cls, config: Any, rank: int, replica: str) -> "SharedGate":
        """This replica's side; makes the board if it is the first.

        The file's name is the same at every start: vLLM hashes it into the key of its
        compile cache.

        Args:
            config: Ray's `LLMConfig` of the replicas.
            rank: of this replica among them.
            replica: its unique name.
        """
        key = board_key(config.model_id, config.engine_kwargs["speculative_config"])
        folder = Path(tempfile.gettempdir(), f"vllm_accel_gates_{os.getuid()}", key)
        folder.mkdir(parents=True, exist_ok=True)
        board = ray.remote(GateBoard).options(**_OPTIONS, name=key)
        return cls(board.remote(), replica, folder / f"{rank}.json")

    async def starting_point(self, config: Any) -> dict[str, Any]:
        """Writes the merged state to the file; the engine arguments that name the file."""
        try:
            state = await self._board.merged.remote()
        except RayError as error:
            state = None
            logger.warning("the gate starts cold, its board did not answer: %s", error)
        if state is not None:
            self._file.write_text(json.dumps(state))
            self._seen = self._file.stat().st_mtime
        given = config.engine_kwargs["speculative_config"]
        settings = {"method": given} if isinstance(given, str) else dict(given)
        return {"speculative_config": {**settings, "gate_state": str(self._file)}}

    async def publish(self) -> None:
        """Sends the state if the gate has written a newer one."""
        written = self._file.stat().st_mtime if self._file.is_file() else 0.0
        if written <= self._seen:
            return
        self._seen = written
        state = json.loads(self._file.read_text())
        try:
            await self._board.publish.remote(self._replica, state)
        except RayError as error:
            logger.warning("the gate's board did not take its state: %s", error)


def board_key(model: str, speculative_config: str | State) -> str:
    """Name of the board of replicas whose gates learn the same thing."""
    said = json.dumps([model, speculative_config], sort_keys=True, default=str)
    return f"gates-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def merged(states: Sequence[State]) -> State:
    """States of gates as one, part by part; those of another make than the newest's drop.

    Raises:
        ConfigError: parts of the same name do not fit together.
    """
    newest = states[-1]
    alike = [state for state in states if state.keys() == newest.keys()]
    return {key: _merged_part([state[key] for state in alike]) for key in newest}


def _merged_part(parts: Sequence[Any]) -> Any:
    newest = parts[-1]
    if isinstance(newest, Mapping) and newest.keys() >= {"weights", "precision"}:
        return calibrators.merge(list(parts))
    if isinstance(newest, Mapping) and "seen_steps" in newest:
        return cost.merge(parts)
    if isinstance(newest, Mapping):
        return merged(parts)
    if isinstance(newest, int | float) and not isinstance(newest, bool):
        return type(newest)(np.mean(parts))
    return newest
