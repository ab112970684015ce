"""Every error a user can meet, as one tree.

    TandemError
    ├── BadInput              what the user wrote is wrong            exit 2   HTTP 400
    │   ├── BadName           a name outside the one pattern          exit 2   HTTP 400
    │   ├── BadRequest        a request body or tensor                exit 2   HTTP 400
    │   │   ├── TooLarge      over a stated limit                     exit 2   HTTP 413
    │   │   ├── UnsupportedMedia  a content type or encoding not taken        HTTP 415
    │   │   ├── WrongMethod   not a method of this route              exit 2   HTTP 405
    │   │   ├── TooSlow       its body did not arrive in time         exit 2   HTTP 408
    │   │   └── Unprocessable well-formed, but not what the model takes       HTTP 422
    │   ├── Unauthorized      no key, or one that isn't valid                  HTTP 401
    │   └── NotFound          no such model, version, run or object   exit 2   HTTP 404
    ├── GateRefused           the servable did not pass its gate      exit 3
    ├── Overloaded            no room now; retry after a stated time           HTTP 503
    ├── NotReady              loading; retry after a stated time               HTTP 503
    ├── RateLimited           over a tenant's limit; retry after a stated time HTTP 429
    ├── DeadlineExceeded      the request's time ran out                       HTTP 504
    ├── StorageError          the object store failed or is out of reach       HTTP 503
    │   └── Damaged           bytes differ from what their manifest says
    ├── Conflict              someone else wrote first                exit 1   HTTP 409
    └── RunFailed             training ended without a commit         exit 1

Each says four things: what failed, the value got, the values allowed, what to do next. Errors
cross process borders, so each survives pickling by Ray (a test round-trips the whole tree).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

_MAX_SHOWN_CHARS = 200


def shown(value: object) -> str:
    """`value` as it may appear in a message: `repr`, on one line, at most 200 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


class TandemError(Exception):
    """The root. `failed` is a sentence; the other parts are optional only where they mean nothing.

    Args:
        failed: what failed.
        got: the value that was got, already fit to show (see `shown`).
        allowed: what would have been accepted.
        fix: what to do next.
    """

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, failed: str, *, got: str = "", allowed: str = "", fix: str = "") -> None:
        self.failed = failed
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(failed)

    def parts(self) -> dict[str, str]:
        """The parts that are set, in the order they are shown."""
        named = {"failed": self.failed, "got": self.got, "allowed": self.allowed, "fix": self.fix}
        return {name: text for name, text in named.items() if text}

    def __str__(self) -> str:
        lines = [self.failed]
        lines += [f"  {name + ':':<8} {text}" for name, text in self.parts().items() if name != "failed"]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), dict(self.__dict__)))

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Self:
        error = cls.__new__(cls)
        Exception.__init__(error, state["failed"])
        error.__dict__.update(state)
        return error


def _rebuild(cls: type[TandemError], state: dict[str, Any]) -> TandemError:
    return cls._from_state(state)


class BadInput(TandemError):
    """What the user wrote is wrong; the same input will fail again."""

    http_status = 400
    exit_code = 2


class BadName(BadInput):
    """A name outside the one pattern that names of models, runs and stores follow."""


class BadRequest(BadInput):
    """A request whose body can't be read."""


class TooLarge(BadRequest):
    """Over a stated limit."""

    http_status = 413


class UnsupportedMedia(BadRequest):
    """A body of a content type, or with a content encoding, that isn't taken."""

    http_status = 415


class WrongMethod(BadRequest):
    """The route is there, but not for this method."""

    http_status = 405


class TooSlow(BadRequest):
    """The body did not arrive in the time it was given."""

    http_status = 408
    retryable = True


class Unprocessable(BadRequest):
    """A well-formed request that is not what the model takes."""

    http_status = 422


class Unauthorized(BadInput):
    """The caller sent no key, or one that isn't valid. Never shows what was sent."""

    http_status = 401


class NotFound(BadInput):
    """No such model, version, alias, run or object."""

    http_status = 404


class GateRefused(TandemError):
    """The servable did not pass its gate; nothing was registered."""

    exit_code = 3


class _RetryLater(TandemError):
    """Carries the number of seconds after which a retry makes sense."""

    http_status = 503
    retryable = True

    def __init__(
        self, failed: str, *, retry_after_s: float, got: str = "", allowed: str = "", fix: str = ""
    ) -> None:
        super().__init__(failed, got=got, allowed=allowed, fix=fix)
        self.retry_after_s = retry_after_s


class Overloaded(_RetryLater):
    """The queue is full; the request was refused before any work was done for it."""


class NotReady(_RetryLater):
    """The model is still being loaded."""


class RateLimited(_RetryLater):
    """The tenant has used up what it may use for now; others are not concerned."""

    http_status = 429


class DeadlineExceeded(TandemError):
    """The request's time ran out before its batch ran."""

    http_status = 504
    retryable = True


class StorageError(TandemError):
    """The object store failed, refused us or is out of reach."""

    http_status = 503
    retryable = True


class Damaged(StorageError):
    """Bytes differ from what their manifest says."""

    retryable = False


class Conflict(TandemError):
    """Someone else wrote first, and what they wrote is not ours to replace."""

    http_status = 409
    retryable = True


class RunFailed(TandemError):
    """Training ended without a commit."""
