"""What can go wrong, as one tree.

```
AccelError
 ├─ ConfigError       a setting is unknown, out of range or in conflict
 ├─ CheckpointError   draft heads are missing, broken or not of this model
 └─ UnsupportedHost   this vLLM, or this way of running it, is not supported
```

Every message is one sentence of what, got, allowed, and what to do.
"""

import difflib
from collections.abc import Iterable, Sequence


class AccelError(Exception):
    """Base of every error vllm_accel raises on purpose."""


class ConfigError(AccelError, ValueError):
    """A setting is unknown, out of range, or in conflict with another."""


class CheckpointError(AccelError):
    """Draft heads are missing, broken, or made for another model."""


class UnsupportedHost(AccelError):
    """The installed vLLM, or what it was asked to run, is not supported."""


def refuse_unknown_keys(keys: Iterable[object], known: Sequence[str], where: str) -> None:
    """Ends at the first key nobody knows, and names the nearest one that is known.

    Args:
        keys: what a user has set.
        known: what may be set.
        where: what it is set for, with its preposition: "for method 'cerberus'".

    Raises:
        ConfigError: a key is unknown.
    """
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            raise ConfigError(
                f"Unknown key {key!r} {where}: expected one of {', '.join(known)}; {hint}"
            )
