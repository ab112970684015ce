"""Errors as clients see them: explained where they can act on it, and never a word more."""

import orjson
import pytest

from cluster import errors
from serving.protocol.failures import render_error


def answer(error: Exception) -> tuple[int, dict, dict[bytes, bytes]]:
    status, body, headers = render_error(error, "req-1")
    return status, orjson.loads(body), dict(headers)


def test_a_clients_mistake_is_explained_in_four_parts() -> None:
    status, body, headers = answer(
        errors.Unprocessable("it failed", got="this", allowed="that", fix="do the other")
    )
    assert status == 422
    assert body == {
        "error": "it failed; got: this; allowed: that; fix: do the other",
        "details": {"failed": "it failed", "got": "this", "allowed": "that", "fix": "do the other"},
        "request_id": "req-1",
    }
    assert headers == {b"content-type": b"application/json"}


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.01, b"1"), (0, b"1"), (1.2, b"2"), (30, b"30")])
def test_retry_after_is_in_whole_seconds_and_at_least_one(retry_after_s: float, header: bytes) -> None:
    for kind in (errors.Overloaded, errors.NotReady):
        status, body, headers = answer(kind("too much to do", retry_after_s=retry_after_s))
        assert (status, headers[b"retry-after"]) == (503, header)
        assert body["error"] == "too much to do"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("secret"), 500),
        (KeyError("secret"), 500),
        (RecursionError("secret"), 500),
        (errors.StorageError("secret", got="s3://secret"), 503),
        (errors.Damaged("secret", got="s3://secret"), 503),
        (errors.RunFailed("secret"), 500),
        (errors.Conflict("secret"), 409),
    ],
)
def test_what_is_not_the_clients_doing_is_not_told(error: Exception, status: int) -> None:
    found, body, _ = answer(error)
    assert found == status
    assert set(body) == {"error", "request_id"}
    assert "secret" not in body["error"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.BadName, 400),
        (errors.BadRequest, 400),
        (errors.NotFound, 404),
        (errors.TooLarge, 413),
        (errors.UnsupportedMedia, 415),
        (errors.Unprocessable, 422),
        (errors.DeadlineExceeded, 504),
    ],
)
def test_each_error_has_its_status(kind: type[errors.TandemError], status: int) -> None:
    assert answer(kind("why"))[:2] == (
        status,
        {"error": "why", "details": {"failed": "why"}, "request_id": "req-1"},
    )
