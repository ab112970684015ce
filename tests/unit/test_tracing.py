"""W3C trace context, and the spans that OpenTelemetry is given."""

from __future__ import annotations

from typing import Any

import pytest

from serving.http import Request
from serving.trace_context import TraceContext, onward, read
from serving.tracing import Spans

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SOUND = f"00-{TRACE}-{PARENT}-01".encode()


def test_a_sound_context_is_passed_on_as_it_is() -> None:
    headers = {b"traceparent": SOUND, b"tracestate": b"a=1, b@v=2", b"x": b"y"}
    assert read(headers) == TraceContext(TRACE, PARENT, 1, "a=1,b@v=2")
    assert onward(headers) == {b"x": b"y", b"traceparent": SOUND, b"tracestate": b"a=1,b@v=2"}
    assert onward({b"x": b"y"}) == {b"x": b"y"}
    assert onward({b"tracestate": b"a=1"}) == {}


@pytest.mark.parametrize(
    "given",
    [
        b"",
        SOUND[:-1],
        SOUND + b"-more",
        SOUND.upper(),
        b"ff" + SOUND[2:],
        f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        b"00-" + b"g" * 32 + SOUND[35:],
        SOUND + b"\n",
    ],
)
def test_a_malformed_one_is_replaced_and_its_state_dropped(given: bytes) -> None:
    headers = {b"traceparent": given, b"tracestate": b"a=1"}
    assert read(headers) is None
    passed = onward(headers)
    fresh = read(passed)
    assert fresh is not None
    assert (fresh.trace_id != TRACE, fresh.sampled, b"tracestate" in passed) == (True, False, False)


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    found = read({b"traceparent": b"cc" + SOUND[2:-2] + b"ff-more"})
    assert found == TraceContext(TRACE, PARENT, 3)


@pytest.mark.parametrize(
    "state",
    [b"A=1", b"a=1,a=2", b"a", b"a=1;b=\xff", b",".join(b"k%d=v" % n for n in range(33)), b"a=" + b"v" * 600],
)
def test_a_bad_state_is_dropped_alone(state: bytes) -> None:
    assert read({b"traceparent": SOUND, b"tracestate": state}) == TraceContext(TRACE, PARENT, 1)


async def _receive() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def _request(parent: bytes | None) -> Request:
    headers = {b"traceparent": parent} if parent is not None else {}
    request = Request("POST", "/v2/models/m/infer", headers, "id", _receive)
    account = request.account
    account.version, account.queue_s, account.run_s, account.decode_s = "3", 0.002, 0.02, 0.001
    return request


def _spans(sample: float) -> tuple[Spans, Any]:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    return Spans(exporter, sample, "m", batched=False), exporter


def test_a_sampled_caller_gets_a_span_with_phases_below_it() -> None:
    spans, exporter = _spans(0.0)
    assert spans.answered(_request(SOUND), "infer", 500, 0.03) == TRACE
    made = {span.name: span for span in exporter.get_finished_spans()}
    assert set(made) == {"decode", "queue", "run", "POST infer"}
    whole = made.pop("POST infer")
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.attributes["tandem.version"] == "3"
    assert whole.end_time - whole.start_time == 30_000_000
    assert not whole.status.is_ok
    assert all(span.parent.span_id == whole.context.span_id for span in made.values())
    assert made["run"].end_time - made["run"].start_time == 20_000_000
    assert made["decode"].end_time == made["queue"].start_time
    spans.stop()


def test_a_caller_that_is_not_sampled_gets_none_whatever_our_share() -> None:
    spans, exporter = _spans(1.0)
    assert spans.answered(_request(SOUND[:-1] + b"0"), "infer", 200, 0.03) == TRACE
    assert exporter.get_finished_spans() == ()
    spans.stop()


@pytest.mark.parametrize(("sample", "made"), [(0.0, 0), (1.0, 4)])
def test_without_a_trace_our_share_decides(sample: float, made: int) -> None:
    spans, exporter = _spans(sample)
    assert bool(spans.answered(_request(None), "infer", 200, 0.03)) == bool(sample)
    assert len(exporter.get_finished_spans()) == made
    spans.stop()
