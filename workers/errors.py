"""Every error about a request or a gang, as one tree:

    SprayError
    + RequestError            the caller's fault; nothing was lost, and asking again does not help
    | + InvalidParameter      one parameter is wrong; `param` names it
    | | + BodyTooLarge        ... or the body as a whole is too large
    | | + BodyTimeout         ... or it came too slowly
    | + IdempotencyKeyReused  its idempotency key belongs to another request
    | + RequestNotFound       no such request waits or runs, or it is another caller's
    | + OutputNotFound        the picture or video at a URL is not kept, or not anymore
    | + InputNotFound         a picture or clip that a job begins with is not kept, or is another one by now
    | + ModelNotFound         no such model in this deployment
    | + JobNotFound           no such job of this caller, or not anymore
    | + JobNotReady           the job has no output, or not yet
    | + Unauthorized          the caller gave no valid API key
    | + RequestQuarantined    the same request has cost several gangs lately; asking again does not help soon
    | + Forbidden             a web page of another site may have sent it, or its URL is not what was signed
    | + ModelNotAllowed       the caller's API key is for other models
    | + AdminOnly             the caller's API key has not the scope for it
    | + UnsupportedMediaType  its body is sent neither as JSON nor as a form
    + ShuttingDown            the deployment takes no new requests
    + TryLater                it would be taken at another time
    | + QueueFull             ... when fewer requests wait for the model
    | + RateLimited           ... when the caller's API key may do more again
    | + GatewaySilent         ... when the gateway that may have it answers again, or is replaced
    | + KeysUnavailable       ... when idempotency keys can be kept again
    + ModelUnavailable        no gang of the model can be started now; ask again later
    + JobsUnavailable         the store of jobs does not answer, or cannot write; nothing is accepted meanwhile
    + DeadlineExceeded        its deadline has passed, or cannot be met
    + RequestFailed           every rank agrees that this request failed; the gang is sound and goes on
    | + OutOfMemory           ... because a device has too little memory for its size; not tried again
    | + RequestCancelled      ... because the caller left
    | + PeerFailed            ... on another rank, which has the reason
    + GangLost                a rank died, hung or broke; the gang is replaced, the request can run elsewhere

`service.api.errors` maps each to its HTTP and gRPC answer. They cross process boundaries by pickle, which rebuilds an
exception from its arguments.
"""


class SprayError(Exception):
    """The root of the tree."""


class RequestError(SprayError):
    """The request cannot be served as it is. `param` names the parameter that is wrong; None: no single one."""

    param: str | None = None


UNKNOWN_LORA = "unknown_lora"
"""The code of an adapter that the ranks do not have."""


class InvalidParameter(RequestError):
    """One parameter of the request is wrong.

    Args:
        param: its name in the API.
        message: what was given, what is allowed.
        code: a stable identifier for programs.
    """

    def __init__(self, param: str | None, message: str, code: str = "invalid_value") -> None:
        super().__init__(param, message, code)
        self.param = param
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return self.message


class BodyTooLarge(InvalidParameter):
    """The body has more bytes than the deployment allows."""


class BodyTimeout(InvalidParameter):
    """The body did not arrive in time."""


class OutputNotFound(RequestError):
    """The picture or video is not kept, or not anymore."""


class InputNotFound(RequestError):
    """A picture or clip that a job begins with is not kept anymore, or is not the one that was sent."""


class IdempotencyKeyReused(RequestError):
    """The caller's idempotency key belongs to another request of the same caller."""

    param = "idempotency-key"


class RequestNotFound(RequestError):
    """No request of this id waits or runs that the caller may see."""


class ModelNotFound(RequestError):
    """The request names a model that the deployment does not have."""

    param = "model"


class JobNotFound(RequestError):
    """The caller has no such job, or not anymore."""


class JobNotReady(RequestError):
    """The job has no output, or not yet."""


class Unauthorized(RequestError):
    """The caller gave no valid API key."""


class RequestQuarantined(RequestError):
    """The same request of the same caller has cost as many gangs as one request may."""


class Forbidden(RequestError):
    """A web page of another site may have sent the request, it asks for a host that this server is not, it comes from
    another machine though only this one may call, or the URL of an output is not what was signed, or has expired."""


class ModelNotAllowed(RequestError):
    """The caller's API key is not for this model."""


class AdminOnly(RequestError):
    """The call concerns what others have asked for, and the caller's API key has not the scope `admin`."""


class UnsupportedMediaType(RequestError):
    """The body is sent neither as JSON nor as a form."""


class ShuttingDown(SprayError):
    """The deployment is about to stop and takes no new requests."""


class TryLater(SprayError):
    """The request would be taken at another time.

    Attributes:
        retry_after_s: when, in seconds from now; None: unknown.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class QueueFull(TryLater):
    """More waits for the model than its `max_queued` or `max_queued_s` allows."""


class RateLimited(TryLater):
    """The caller's API key has used what it is allowed."""


class GatewaySilent(TryLater):
    """What is asked for may be in a gateway that does not answer."""


class KeysUnavailable(TryLater):
    """Idempotency keys cannot be kept now, so nothing can be done exactly once."""


class ModelUnavailable(SprayError):
    """No gang of the model runs, and none is on its way."""


class JobsUnavailable(SprayError):
    """The store of jobs does not answer, or cannot write."""


class OutputsFull(TryLater):
    """There is no room to keep what was asked for."""


class OutputsUnavailable(TryLater):
    """Where finished files are kept does not answer."""


class DeadlineExceeded(SprayError):
    """The request has a deadline that has passed, or its turn would come too late."""


class RequestFailed(SprayError):
    """The request failed on a sound gang."""


class OutOfMemory(RequestFailed):
    """A device has too little memory for the request.

    Args:
        message: what was asked for, and what would fit.
        agreed: all ranks have stopped at the same boundary. If not, the gang is lost; this is the one `RequestFailed`
            that may say so, because another gang would have as little memory.
    """

    def __init__(self, message: str, agreed: bool) -> None:
        super().__init__(message, agreed)
        self.message = message
        self.agreed = agreed

    def __str__(self) -> str:
        return self.message


class RequestCancelled(RequestFailed):
    """The caller left, and the ranks stopped at a boundary."""


class PeerFailed(RequestFailed):
    """This rank stopped because another rank failed; that one has the reason."""


class GangLost(SprayError):
    """A rank died, hung or broke in the middle of a forward; its whole gang is gone."""
