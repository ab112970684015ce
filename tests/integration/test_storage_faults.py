"""A server that fails in every way a server can: what passes by itself is ridden out, the rest told."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Kind
from seaweed import Seaweed

from cluster.artifacts import Artifacts
from cluster.errors import Damaged, NotFound, StorageError
from cluster.manifest import read_file
from cluster.storage import Deadlines, Store, open_store

PATIENT = Deadlines(connect_s=1, request_s=2, retry_s=30)
IMPATIENT = Deadlines(connect_s=1, request_s=2, retry_s=0)
BODY = os.urandom(200_000)
LARGE = os.urandom(9_000_000)

CALLS: dict[str, Callable[[Store], Any]] = {
    "put": lambda store: store.put("new", BODY),
    "put_if_absent": lambda store: store.put_if_absent("created", BODY),
    "get": lambda store: store.get("old") == BODY,
    "get large": lambda store: store.get("large") == LARGE,
    "size_bytes": lambda store: store.size_bytes("old") == len(BODY),
    "keys": lambda store: "old" in store.keys(""),
    "folders": lambda store: store.folders("") == ["folder"],
    "delete": lambda store: store.delete(["nothing"]),
}

PASSING = [
    Fault(Kind.STATUS, status=500, times=2),
    Fault(Kind.STATUS, status=502),
    Fault(Kind.STATUS, status=503, times=2),
    Fault(Kind.STATUS, status=504),
    Fault(Kind.STATUS, status=429),
    Fault(Kind.CUT_REQUEST, at_byte=1000, times=2),
    Fault(Kind.CUT_RESPONSE, at_byte=1000, times=2),
    Fault(Kind.LOST_RESPONSE, times=2),
]


@pytest.fixture
def proxy(s3_env: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_env.endpoint, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def uri(s3_env: Seaweed, request: pytest.FixtureRequest) -> str:
    return s3_env.uri(Seaweed.BUCKET, f"faults/{abs(hash(request.node.nodeid)):x}")


def filled(uri: str) -> None:
    store = open_store(uri)
    store.put("old", BODY)
    store.put("large", LARGE)
    store.put("folder/one", b"1")


@pytest.mark.parametrize("name", CALLS)
def test_whatever_passes_by_itself_is_ridden_out(
    proxy: FaultProxy, uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.retry.FIRST_PAUSE_S", 0.01)
    filled(uri)
    store = open_store(uri, PATIENT)
    for fault in PASSING:
        before = proxy.counts[fault.kind]
        proxy.arm(fault)
        assert CALLS[name](store) in (True, None), fault
        assert proxy.counts[fault.kind] > before, "the fault did happen"
        proxy.clear()
    if name.startswith("put"):
        assert store.get("new" if name == "put" else "created") == BODY
        assert store.put_if_absent("created" if name != "put" else "new", b"theirs") is False


def test_a_server_that_never_answers_is_asked_again(proxy: FaultProxy, uri: str) -> None:
    filled(uri)
    store = open_store(uri, Deadlines(connect_s=1, request_s=0.5, retry_s=30))
    for name in ("put", "put_if_absent", "get"):
        proxy.arm(Fault(Kind.BLACK_HOLE))
        assert CALLS[name](store) in (True, None), name
    assert proxy.counts[Kind.BLACK_HOLE] == 3


@pytest.mark.parametrize("status", [400, 403, 404, 501])
def test_what_will_not_change_is_told_at_once(proxy: FaultProxy, uri: str, status: int) -> None:
    filled(uri)
    store = open_store(uri, PATIENT)
    for name in ("put", "put_if_absent", "get", "keys"):
        before = proxy.counts[Kind.STATUS]
        proxy.arm(Fault(Kind.STATUS, status=status, times=None))
        with pytest.raises(NotFound if (name, status) == ("get", 404) else StorageError):
            CALLS[name](store)
        assert proxy.counts[Kind.STATUS] == before + 1, f"{name}: asked once"
        proxy.clear()


def test_a_server_that_is_gone_for_longer_than_a_few_tries_is_waited_for(proxy: FaultProxy, uri: str) -> None:
    filled(uri)
    store = open_store(uri, PATIENT)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(store.put_if_absent("created", b"mine")))
    with proxy.down():
        with pytest.raises(StorageError):
            open_store(uri, Deadlines(connect_s=1, request_s=1, retry_s=1)).get("old")
        waiting.start()
        waiting.join(1.7)
        assert done == []
    waiting.join(30)
    assert done == [True]


def test_a_write_whose_outcome_is_unknown_can_be_repeated(proxy: FaultProxy, uri: str) -> None:
    store = open_store(uri, IMPATIENT)
    proxy.arm(Fault(Kind.LOST_RESPONSE, method="PUT"))
    with pytest.raises(StorageError):
        store.put_if_absent("created", b"mine")
    assert proxy.counts[Kind.LOST_RESPONSE] == 1
    assert store.put_if_absent("created", b"mine") is True
    assert store.put_if_absent("created", b"theirs") is False


def test_what_a_line_spoils_on_the_way_is_read_again(proxy: FaultProxy, uri: str) -> None:
    store = open_store(uri, PATIENT)
    manifest = Artifacts(store, "c", "checkpoint").commit(1, {"f": BODY}, {})
    for kind in (Kind.FLIP, Kind.SHORTEN):
        proxy.arm(Fault(kind, method="GET", key="/f$", at_byte=150_000))
        assert read_file(store, manifest, "f") == BODY
        assert proxy.counts[kind] == 1
        proxy.arm(Fault(kind, method="GET", key="/f$", at_byte=150_000, times=None))
        with pytest.raises(Damaged):
            read_file(store, manifest, "f")
        proxy.clear()


def test_a_large_file_survives_parts_that_fail(proxy: FaultProxy, uri: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(LARGE * 3)
    proxy.arm(Fault(Kind.STATUS, method="PUT", key="partNumber", share=0.5, times=4))
    open_store(uri, PATIENT).put("parts", path)
    assert proxy.counts[Kind.STATUS] > 0
    assert open_store(uri).get("parts") == LARGE * 3


def test_the_same_seed_hits_the_same_requests(
    s3_env: Seaweed, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = []
    for _ in range(2):
        with FaultProxy(s3_env.endpoint, seed=5) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            store = open_store(uri, IMPATIENT)
            proxy.arm(Fault(Kind.STATUS, share=0.5, times=None))
            seen = []
            for _ in range(12):
                before = proxy.counts[Kind.STATUS]
                with contextlib.suppress(StorageError):
                    store.size_bytes("nothing")
                seen.append(proxy.counts[Kind.STATUS] - before)
            hits.append(seen)
    assert hits[0] == hits[1]
    assert set(hits[0]) == {0, 1}
