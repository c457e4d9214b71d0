"""Every error Quire raises on purpose.

    QuireError
    ├── RequestError            a request at fault; carries the HTTP status and the name of the parameter
    │   ├── QueueFullError          429, with the seconds after which a retry makes sense
    │   ├── EngineUnavailableError  503, the engine is loading, draining or being restarted
    │   ├── DeadlineError           408, the request took longer than it may
    │   └── QuarantinedError        400, the engine died whenever it computed the request
    ├── ConfigError             an option of the engine or the command line
    ├── CheckpointError         a file of the model: missing, truncated, misshapen, unsupported
    ├── MemoryPlanError         the options do not fit the memory
    ├── DeviceMemoryError       a device lacked memory for a step; the engine continues with smaller steps
    └── EngineDeadError         the engine process ended and could not be restarted

A message names the value seen, the limit or the expectation, and the way out.
"""

NO_TOKEN_LEFT = "no token is left to sample"
GRAMMAR_FAILED = "the grammar of structured_outputs failed"
BEAMS_MISSING = "the beam search found"
CLIENT_FAULTS = (NO_TOKEN_LEFT, GRAMMAR_FAILED, BEAMS_MISSING)
"""Beginnings of `CompletionOutput.error` for a sample that ended because its parameters contradict each other."""


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
    """The engine takes no requests now: it is loading, draining or restarting."""

    status = 503

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, code="engine_unavailable")
        self.retry_after = retry_after


class DeadlineError(RequestError):
    """A request that took longer than its client or the server allows."""

    status = 408

    def __init__(self, message: str) -> None:
        super().__init__(message, code="deadline_exceeded")


class QuarantinedError(RequestError):
    """A request at which the engine process died again and again, at last with nothing else in the step."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_quarantined")


class ConfigError(QuireError, ValueError):
    """An option that is unknown, out of range, or in conflict with another one."""


class CheckpointError(QuireError):
    """A model folder that cannot be loaded. The message names the file, the tensor, and what was expected and found."""


class MemoryPlanError(QuireError):
    """Weights, activations and KV blocks do not fit. The message contains the plan and what would fit."""


class DeviceMemoryError(QuireError):
    """A device ran out of memory in a step. The step has no effect; it can be planned again, smaller."""


class EngineDeadError(QuireError):
    """The engine process has ended for good. The message has the reason."""
