"""The HTTP layer: bounds on bodies, ids, clients that go away, errors as answers."""

import asyncio
from typing import Any

import numpy as np
import pytest

from cluster.errors import Overloaded
from cluster.keys import Keys, Limits
from cluster.storage import memory_store
from serving import http, lane
from serving.guard import Guard
from serving.http import HttpApp, Request, Response, request_id


class Echo(HttpApp):
    """Answers with the body; `/slow` waits for ever; `/fail` raises what it is given."""

    error: Exception = ValueError("secret")

    async def respond(self, request: Request) -> Response:
        body = await self.read_body(request)
        if request.path == "/slow":
            with self.while_connected(request):
                await asyncio.Event().wait()
        if request.path == "/fail":
            raise self.error
        return Response(200, body)


def call(
    app: HttpApp,
    messages: list[Any],
    path: str = "/",
    headers: list[Any] | None = None,
    method: str = "POST",
) -> dict[str, Any]:
    """Send one request; a number among the messages is a pause in seconds, the end a silent client."""

    async def run() -> dict[str, Any]:
        queue = list(messages)
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            while queue and isinstance(queue[0], float):
                await asyncio.sleep(queue.pop(0))
            if not queue:
                await asyncio.Event().wait()
            return queue.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers or []}
        await asyncio.wait_for(app.serve_directly(scope, receive, send), 20)
        return {
            "status": sent[0]["status"],
            "headers": dict(sent[0]["headers"]),
            "body": sent[1]["body"],
        }

    return asyncio.run(run())


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_a_body_in_pieces_is_put_together() -> None:
    answer = call(Echo(max_body_bytes=100), [chunk(b"ab", True), chunk(b"", True), chunk(b"c")])
    assert (answer["status"], answer["body"]) == (200, b"abc")
    assert answer["headers"][b"content-length"] == b"3"


@pytest.mark.parametrize("at", [0, 1, 7, 8, 117])
def test_numbers_in_a_body_are_aligned_by_the_one_copy_that_is_made(at: int) -> None:
    numbers = np.arange(1000, dtype="<f8")
    body = b"j" * at + numbers.tobytes()

    class Reader(HttpApp):
        async def respond(self, request: Request) -> Response:
            whole = await self.read_aligned(request, at)
            found = np.frombuffer(whole[at:], "<f8")
            assert found.flags.aligned
            assert np.array_equal(found, numbers)
            return Response(200, bytes(whole))

    for pieces in ([chunk(body)], [chunk(body[:50], True), chunk(body[50:])]):
        assert call(Reader(max_body_bytes=10_000), list(pieces))["body"] == body


@pytest.mark.parametrize(
    ("messages", "headers"),
    [
        ([chunk(b"", True)], [(b"content-length", b"101")]),
        ([chunk(b"x" * 101)], []),
        ([chunk(b"x" * 60, True), chunk(b"x" * 60, True)], [(b"transfer-encoding", b"chunked")]),
        ([chunk(b"x" * 60, True), chunk(b"x" * 60, True)], [(b"content-length", b"5")]),
    ],
)
def test_too_large_however_it_is_sent(messages: list[Any], headers: list[Any]) -> None:
    app = Echo(max_body_bytes=100)
    answer = call(app, messages, headers=headers)
    assert answer["status"] == 413
    if headers:
        assert answer["headers"][b"connection"] == b"close"
    assert call(app, [chunk(b"x" * 100)])["status"] == 200


def test_a_slow_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_GRACE_S", 0.05)
    answer = call(Echo(max_body_bytes=100), [chunk(b"a", True)], headers=[(b"content-length", b"3")])
    assert answer["status"] == 408
    assert answer["headers"][b"connection"] == b"close"


def test_a_trickle_is_too_slow_though_something_always_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_GRACE_S", 0.05)
    trickle: list[Any] = [chunk(b"a", True), 0.02] * 50
    assert call(Echo(max_body_bytes=100), trickle)["status"] == 408


def test_bodies_that_arrive_together_share_a_bound() -> None:
    app = Echo(max_body_bytes=100, max_buffered_bytes=120)

    async def main() -> list[int]:
        async def one() -> int:
            sent: list[Any] = []
            pieces = iter([chunk(b"x" * 50, True), chunk(b"x" * 50)])

            async def receive() -> Any:
                await asyncio.sleep(0.01)
                return next(pieces)

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
            await app.serve_directly(scope, receive, send)
            return int(sent[0]["status"])

        return list(await asyncio.gather(*[one() for _ in range(4)]))

    statuses = asyncio.run(main())
    assert 503 in statuses
    assert call(app, [chunk(b"x" * 50, True), chunk(b"x" * 50)])["status"] == 200


def test_a_client_that_goes_away_ends_its_request() -> None:
    app = Echo(max_body_bytes=100)
    assert call(app, [chunk(b"a"), 0.15, GONE], path="/slow")["status"] == 499
    assert app.in_flight == 0
    assert call(app, [GONE])["status"] == 499


def test_errors_become_answers_and_say_no_secrets() -> None:
    app = Echo(max_body_bytes=100)
    answer = call(app, [chunk(b"")], path="/fail")
    assert answer["status"] == 500
    assert b"secret" not in answer["body"]
    app.error = Overloaded("full", retry_after_s=2.5)
    answer = call(app, [chunk(b"")], path="/fail")
    assert (answer["status"], answer["headers"][b"retry-after"]) == (503, b"3")


@pytest.mark.parametrize("given", [b"", b"a b", b"a\r\nb", b"x" * 129, "é".encode()])
def test_insane_ids_are_replaced(given: bytes) -> None:
    assert request_id({b"x-request-id": given}) != given.decode("latin-1")
    assert request_id({b"x-request-id": b"ok-1"}) == "ok-1"


def test_whoever_has_no_key_is_turned_away_before_the_body_is_read() -> None:
    keys = Keys(memory_store())
    made = keys.create("team")
    app = Echo(max_body_bytes=1000, guard=Guard(keys.tenants()))
    answer = call(app, [], headers=[(b"content-length", b"5")])  # a body that never comes
    assert answer["status"] == 401
    assert answer["headers"][b"www-authenticate"].startswith(b"Bearer")
    assert answer["headers"][b"connection"] == b"close"

    headers = [(b"authorization", f"Bearer {made.text}".encode())]
    assert call(app, [chunk(b"hello")], headers=headers)["body"] == b"hello"
    probe = call(app, [chunk(b"")], path="/v2/models/digits/ready", method="GET")
    assert probe["status"] == 200
    for path in ("/v2/models/ready", "/metrics", "/v2/models/live", "/v2/models/digits/ready/x"):
        assert call(app, [chunk(b"")], path=path, method="GET")["status"] == 401
    assert call(app, [chunk(b"")], path="/v2/models/digits/ready")["status"] == 401


def test_a_tenant_over_its_limit_gets_429_and_a_time() -> None:
    keys = Keys(memory_store())
    made = keys.create("team", Limits(requests_per_s=0.01, burst=1))
    app = Echo(max_body_bytes=1000, guard=Guard(keys.tenants()))
    headers = [(b"x-api-key", made.text.encode())]
    answers = [call(app, [chunk(b"hello")], headers=headers) for _ in range(2)]
    assert [answer["status"] for answer in answers] == [200, 429]
    assert 1 <= int(answers[1]["headers"][b"retry-after"]) <= 100


def test_the_short_way_is_taken_only_by_an_entered_application() -> None:
    seen: list[str] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())

    async def main() -> None:
        middleware = lane.ShortWay(serve)
        sent: list[Any] = []

        async def receive() -> Any:
            return chunk(b"hello")

        async def send(message: Any) -> None:
            sent.append(message)

        def scope(path: str) -> Any:
            return {"type": "http", "method": "POST", "path": path, "headers": [(b"x-request-id", b"a b")]}

        await middleware(scope("/x"), receive, send)
        lane.enter(Echo(max_body_bytes=10))
        try:
            await middleware(scope("/x"), receive, send)
            await middleware(scope("/-/healthz"), receive, send)
        finally:
            lane.leave()
        assert sent[1]["body"] == b"hello"

    asyncio.run(main())
    assert len(seen) == 2
    assert all(id_given != "a b" for id_given in seen)
