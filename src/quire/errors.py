"""Every error Quire raises on purpose.

    QuireError
    ├── RequestError            a client did it: the HTTP status and the parameter at fault travel with it
    │   ├── QueueFullError          429, with the seconds after which a retry makes sense
    │   └── EngineUnavailableError  503, the engine is loading, draining or being restarted
    ├── ConfigError             an option of the engine or the command line
    ├── CheckpointError         a file of the model: missing, truncated, misshapen, unsupported
    ├── MemoryPlanError         what was asked does not fit the memory there is
    ├── DeviceMemoryError       a device had not the memory that a step asked for; the engine goes on with less
    └── EngineDeadError         the engine process ended and could not be restarted

A message names the value seen, the limit or the expectation, and the way out.
"""


class QuireError(Exception):
    """Root of the tree; catching it catches everything Quire raises on purpose."""


class RequestError(QuireError, ValueError):
    """A request that cannot be served as sent. `param` names the field at fault, `code` is stable for programs."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class QueueFullError(RequestError):
    """More requests are waiting than `max_queue_size` allows. `retry_after` is in seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after = retry_after


class EngineUnavailableError(RequestError):
    """The engine takes no requests now: weights are loading, the server drains, or a restart is under way."""

    status = 503

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, code="engine_unavailable")
        self.retry_after = retry_after


class ConfigError(QuireError, ValueError):
    """An option that is unknown, out of range, or at odds with another one."""


class CheckpointError(QuireError):
    """A model folder that cannot be loaded; the message names file, tensor, expected and found."""


class MemoryPlanError(QuireError):
    """Weights, activations and KV blocks do not fit; the message holds the plan and what would fit."""


class DeviceMemoryError(QuireError):
    """A device was out of memory inside a step. Nothing of the step counts; it can be planned again, smaller."""


class EngineDeadError(QuireError):
    """The engine process is gone for good; the message carries its last words."""
