"""Errors: one tree, each class with its HTTP status, type and code.

    JiljuError
    ├── InvalidRequest            400  the caller's input; subclasses say which rule it broke
    │   ├── InvalidJson, MissingParameter, InvalidValue, ConflictingParameters
    │   ├── UnknownParameter, UnsupportedParameter, UnsupportedContent
    │   ├── UnsupportedTask
    │   ├── EmptyPrompt, TemplateFailed, NoAllowedToken
    │   ├── InvalidGrammar, GrammarTooComplex
    │   └── ContextLengthExceeded, KvCapacityExceeded
    ├── InvalidApiKey             401
    ├── Forbidden                 403
    ├── ModelNotFound, RouteNotFound, RequestNotFound, RunNotFound   404
    ├── MethodNotAllowed          405
    ├── RequestTimeout            408
    ├── BodyTooLarge              413
    ├── HeadersTooLarge           431
    ├── UnsupportedMediaType      415
    ├── Overloaded                429
    ├── RateLimitExceeded         429  the key's own quota
    ├── RequestCancelled          499  by the caller's own word
    ├── InternalError             500  our fault, this request alone
    │   ├── NanLogits, GrammarDeadEnd   500
    │   └── RequestQuarantined    500
    ├── NotReady                  503  loading, draining, restarting
    ├── EngineUnavailable         503  given up
    ├── DeadlineExceeded          504
    └── StartupError              --   what stops a command before it serves: bad file, bad config, no memory
        ├── ModelFileError             a model file that lies, is cut short or is not supported
        ├── ModelSourceError           a model that cannot be fetched
        ├── LicenceNotAccepted         a model whose terms the user has not accepted
        ├── ConfigError                a flag or an environment variable
        ├── PlatformError              a machine that jilju does not run on
        └── BusyMachine                a measurement that other processes disturb

Knows nothing of HTTP beyond the numbers. A message says what was given, what is allowed and what to do.
"""

from typing import ClassVar, Literal

ShedReason = Literal["queue_requests", "queue_tokens", "predicted_wait"]


class JiljuError(Exception):
    """Base of all errors that jilju raises on purpose. `param` names the field, `retry_after_s` a wait that is worth it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(JiljuError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class MissingParameter(InvalidRequest):
    code = "missing_parameter"


class InvalidValue(InvalidRequest):
    code = "invalid_value"


class ConflictingParameters(InvalidRequest):
    code = "conflicting_parameters"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class UnsupportedContent(InvalidRequest):
    code = "unsupported_content"


class UnsupportedTask(InvalidRequest):
    code = "unsupported_task"


class EmptyPrompt(InvalidRequest):
    code = "empty_prompt"


class TemplateFailed(InvalidRequest):
    code = "template_error"


class NoAllowedToken(InvalidRequest):
    code = "no_allowed_token"


class InvalidGrammar(InvalidRequest):
    code = "invalid_grammar"


class GrammarTooComplex(InvalidRequest):
    code = "grammar_too_complex"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class KvCapacityExceeded(InvalidRequest):
    code = "kv_capacity_exceeded"


class InvalidApiKey(InvalidRequest):
    status, code = 401, "invalid_api_key"


class Forbidden(InvalidRequest):
    status, code = 403, "forbidden"


class ModelNotFound(InvalidRequest):
    status, code = 404, "model_not_found"


class RouteNotFound(InvalidRequest):
    status, code = 404, "route_not_found"


class RequestNotFound(InvalidRequest):
    status, code = 404, "request_not_found"


class RunNotFound(InvalidRequest):
    status, code = 404, "run_not_found"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


class RequestTimeout(InvalidRequest):
    status, code = 408, "request_timeout"


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body_too_large"


class HeadersTooLarge(InvalidRequest):
    status, code = 431, "headers_too_large"


class UnsupportedMediaType(InvalidRequest):
    status, code = 415, "unsupported_media_type"


class Overloaded(JiljuError):
    """`predicted_wait_ns`: until the first step, had the request been taken; None where nobody predicted it."""

    status, type, code = 429, "rate_limit_error", "overloaded"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        reason: ShedReason = "queue_requests",
        predicted_wait_ns: int | None = None,
    ):
        super().__init__(message, retry_after_s=retry_after_s)
        self.reason = reason
        self.predicted_wait_ns = predicted_wait_ns


class RateLimitExceeded(JiljuError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class RequestCancelled(JiljuError):
    """What a call that its caller has cancelled by id is told; nginx's status for a client that has left."""

    status, type, code = 499, "invalid_request_error", "request_cancelled"


class InternalError(JiljuError):
    status, code = 500, "internal"


class DeviceLost(InternalError):
    """The device computes no more for this process: whatever ran there is gone, and another process must go on."""


class NanLogits(InternalError):
    code = "nan_logits"


class GrammarDeadEnd(InternalError):
    """No token is left that a grammar allows."""

    code = "grammar_dead_end"


class RequestQuarantined(InternalError):
    code = "request_quarantined"


class NotReady(JiljuError):
    status, code = 503, "not_ready"


class EngineUnavailable(JiljuError):
    status, code = 503, "engine_unavailable"


class DeadlineExceeded(JiljuError):
    status, code = 504, "deadline_exceeded"


class StartupError(JiljuError):
    """Stops a command before it serves; the CLI prints the message alone, without a traceback, and exits with 1."""


class ModelFileError(StartupError):
    """`file`, `field`, what it holds (`given`) and what may stand there (`allowed`): all four are in the message."""

    def __init__(self, file: str, field: str, given: object, allowed: str):
        shown = str(given)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        super().__init__(f"{file}: {field} is {shown}; allowed: {allowed}")
        self.file, self.field, self.given, self.allowed = file, field, given, allowed


class ModelSourceError(StartupError):
    pass


class LicenceNotAccepted(StartupError):
    pass


class ConfigError(StartupError):
    pass


class PlatformError(StartupError):
    pass


class BusyMachine(StartupError):
    pass
