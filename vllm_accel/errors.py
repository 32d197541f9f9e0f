"""What can go wrong, as one tree.

```
AccelError
 ├─ ConfigError       a setting is unknown, out of range or in conflict
 ├─ CheckpointError   draft heads are missing, broken or not of this model
 └─ UnsupportedHost   this vLLM, or this way of running it, is not supported
```

Every message is one sentence of what, got, allowed, and what to do.
"""


class AccelError(Exception):
    """Base of every error vllm_accel raises on purpose."""


class ConfigError(AccelError, ValueError):
    """A setting is unknown, out of range, or in conflict with another."""


class CheckpointError(AccelError):
    """Draft heads are missing, broken, or made for another model."""


class UnsupportedHost(AccelError):
    """The installed vLLM, or what it was asked to run, is not supported."""
