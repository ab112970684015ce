"""Storage, manifests and the registry on a real S3 server, and on servers that misbehave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from seaweed import Seaweed

from cluster.artifacts import Artifacts
from cluster.errors import Conflict, Damaged, NotFound, StorageError
from cluster.manifest import Manifest, read_file
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import Deadlines, Store, arrow_filesystem, open_store

DEADLINE_S = 60
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(s3_env: Seaweed, request: pytest.FixtureRequest) -> Store:
    """A prefix of its own for each test."""
    return open_store(prefix(s3_env, request))


def prefix(server: Seaweed, request: pytest.FixtureRequest) -> str:
    return server.uri(Seaweed.BUCKET, sha256(request.node.nodeid.encode()).hexdigest()[:12])


def race(attempts: list[Callable[[], Any]]) -> list[Any]:
    """What each of some attempts gives when all of them start at one moment."""
    start = threading.Barrier(len(attempts), timeout=DEADLINE_S)

    def run(attempt: Callable[[], Any]) -> Any:
        start.wait()
        return attempt()

    with ThreadPoolExecutor(len(attempts)) as pool:
        return list(pool.map(run, attempts, timeout=DEADLINE_S))


def within_deadline(call: Callable[[], Any]) -> BaseException | None:
    """What `call` raises, or None; fails the test where it doesn't end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive(), "still waiting"
    return raised[0] if raised else None


def test_what_is_written_is_read(store: Store) -> None:
    for key, data in {"a/one": b"1", "a/b/two": b"", "a/c d/ü+%41": bytes(range(256))}.items():
        store.put(key, data)
        assert store.get(key) == data
        assert b"".join(store.chunks(key)) == data
        assert store.size_bytes(key) == len(data)
    assert store.keys("a") == ["a/b/two", "a/c d/ü+%41", "a/one"]
    assert store.folders("a") == ["b", "c d"]
    store.delete(["a/one", "a/never"])
    assert store.size_bytes("a/one") is None
    with pytest.raises(NotFound):
        store.get("a/one")


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(64 * 1024 * 1024 + 7))
    store.put("large", path)
    assert store.size_bytes("large") == path.stat().st_size
    assert sha256(store.get("large")).digest() == sha256(path.read_bytes()).digest()
    assert max(map(len, store.chunks("large"))) <= 8 * 1024 * 1024


def test_an_object_replaced_while_it_is_read_is_an_error(store: Store) -> None:
    store.put("changing", b"a" * 64 * 1024 * 1024)
    chunks = store.chunks("changing")
    assert set(next(chunks)) == {ord("a")}
    store.put("changing", b"b" * 64 * 1024 * 1024)
    with pytest.raises(StorageError):
        assert ord("b") not in {letter for chunk in chunks for letter in set(chunk)}


def test_of_16_racing_threads_one_creates(store: Store) -> None:
    for number in range(3):
        key = f"race/{number}"
        won = race([partial(store.put_if_absent, key, b"%d" % n) for n in range(16)])
        assert won.count(True) == 1
        assert store.get(key) == b"%d" % won.index(True)


RACER = """
import sys
from cluster.storage import open_store
store, me = open_store(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
print("".join("1" if store.put_if_absent(f"race/{n}", me) else "0" for n in range(20)))
"""


def test_of_4_racing_processes_one_creates(store: Store, s3_env: Seaweed) -> None:
    command = [sys.executable, "-c", RACER, store.uri]
    racers = [
        subprocess.Popen(
            [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
        )
        for number in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        wins = [racer.communicate(timeout=DEADLINE_S)[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate(timeout=DEADLINE_S)
    for number, column in enumerate(zip(*wins, strict=True)):
        assert column.count("1") == 1
        assert store.get(f"race/{number}") == str(column.index("1")).encode()


def test_racing_promoters_lose_no_entry(store: Store) -> None:
    registry = Registry(store)
    for run in ("one", "two"):
        registry.register(
            "m", manifest_key=f"{run}/manifest.json", manifest=b"{}", run=run, metrics={}, why=""
        )

    def promoter(name: str) -> Callable[[], list[int]]:
        own = Registry(open_store(store.uri))
        return lambda: [
            own.promote("m", name, 1 + turn % 2, why=f"{name} {turn}").number for turn in range(4)
        ]

    numbers = race([promoter(f"alias-{n}") for n in range(4)])
    history = registry.history("m")
    assert [entry.number for entry in history] == list(range(1, 2 + 16 + 1))
    assert sorted(number for turns in numbers for number in turns) == list(range(3, 19))
    assert all(turns == sorted(turns) for turns in numbers), "each promoter's entries are in its order"
    assert {entry.why for entry in history[2:]} == {
        f"alias-{n} {turn}" for n in range(4) for turn in range(4)
    }
    assert {alias: target.version for alias, target in history[-1].aliases.items()} == {
        f"alias-{n}": 2 for n in range(4)
    }
    assert registry.rollback("m", "alias-0", why="").aliases["alias-0"].version == 1
    assert registry.resolve(ModelRef("m", "alias-0")).run == "one"


def test_of_racing_commits_one_stands_whole(store: Store) -> None:
    def commit(writer: int) -> Callable[[], Manifest | None]:
        def attempt() -> Manifest | None:
            own = Artifacts(open_store(store.uri), "checkpoints", "checkpoint")
            files: dict[str, bytes | Path] = {f"f{n}": b"%d" % writer * 1000 for n in range(4)}
            try:
                return own.commit(1, files, {"writer": writer})
            except Conflict:
                return None

        return attempt

    (won,) = [manifest for manifest in race([commit(n) for n in range(6)]) if manifest]
    artifacts = Artifacts(store, "checkpoints", "checkpoint")
    assert artifacts.read(1) == won
    for name in won.files:
        assert read_file(store, won, name) == b"%d" % won.meta["writer"] * 1000


def flip_a_bit(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize("harm", [flip_a_bit, lambda data: data[:-1], lambda data: b"", None])
def test_a_damaged_checkpoint_is_seen_and_passed_over(
    store: Store, harm: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    artifacts = Artifacts(store, "checkpoints", "checkpoint")
    path = tmp_path / "weights"
    for number in (1, 2, 3):
        path.write_bytes(bytes([number]) * 100_000)
        artifacts.commit(number, {"weights": path, "cursor.json": b"%d" % number}, {})
    key = artifacts.read(3).files["weights"].key
    if harm is None:
        store.delete([key])
    else:
        store.put(key, harm(store.get(key)))
    with pytest.raises(Damaged if harm else NotFound):
        artifacts.read_file(artifacts.read(3), "weights")

    passed: list[int] = []
    found = artifacts.newest(
        lambda manifest: [artifacts.read_file(manifest, name) for name in manifest.files],
        lambda number, error: passed.append(number),
    )
    assert found is not None
    manifest, files = found
    assert (manifest.number, passed) == (2, [3])
    assert files == [b"\2" * 100_000, b"2"]


def test_without_its_manifest_nothing_exists(store: Store) -> None:
    store.put("checkpoints/00000001/attempt/weights", b"x")
    artifacts = Artifacts(store, "checkpoints", "checkpoint")
    assert artifacts.head() == 0
    assert artifacts.newest(lambda manifest: manifest, lambda *_: pytest.fail("nothing is damaged")) is None


def test_a_wrong_secret_is_refused_and_never_shown(
    s3_env: Seaweed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a")
    stranger = open_store(store.uri)
    for attempt in (
        lambda: stranger.get("x"),
        lambda: stranger.put("x", b""),
        lambda: stranger.put_if_absent("x", b""),
        lambda: stranger.keys(""),
        lambda: stranger.folders(""),
        lambda: stranger.size_bytes("x"),
        lambda: stranger.delete(["x"]),
    ):
        with pytest.raises(StorageError) as caught:
            attempt()
        text = str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)
        assert "canary" not in text
        assert s3_env.env["AWS_SECRET_ACCESS_KEY"] not in text
        assert "credentials" in caught.value.fix


def test_pyarrow_reads_what_was_written(store: Store, tmp_path: Path) -> None:
    table = pa.table({"id": range(1000), "text": [str(n) for n in range(1000)]})
    for number in range(2):
        pq.write_table(table, tmp_path / "part")
        store.put(f"data/{number}.parquet", tmp_path / "part")
    filesystem, path = arrow_filesystem(f"{store.uri}/data")
    assert pq.read_table(path, filesystem=filesystem).num_rows == 2000


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_black_hole_ends_in_an_error(
    s3_env: Seaweed, black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", black_hole)
    store = open_store("s3://bucket/x", Deadlines(connect_s=0.5, request_s=0.5, retry_s=1))
    for call in (
        lambda: store.get("k"),
        lambda: store.put("k", b"1"),
        lambda: store.put("k", b"1" * 20_000_000),
        lambda: store.put_if_absent("k", b"1"),
        lambda: store.keys(""),
        lambda: store.size_bytes("k"),
        lambda: store.delete(["k"]),
    ):
        error = within_deadline(call)
        assert isinstance(error, StorageError)
        assert "1.5 s" in error.allowed


def test_pyarrow_does_not_wait_for_a_black_hole(
    s3_env: Seaweed, black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", black_hole)
    filesystem, path = arrow_filesystem("s3://bucket/x", Deadlines(connect_s=0.2, request_s=0.2, retry_s=0))
    assert isinstance(within_deadline(lambda: filesystem.get_file_info(path)), OSError)


class LosesAnswers:
    """A proxy in front of a server that passes requests on but drops the first answer to a PUT."""

    def __init__(self, endpoint: str) -> None:
        self.lost = 0
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._upstream = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # Closing alone would leave the thread in accept().
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream, DEADLINE_S) as server:
            client.settimeout(DEADLINE_S)
            while request := client.recv(1 << 20):
                server.sendall(request)
                answer = server.recv(1 << 20)
                if request.startswith(b"PUT") and not self.lost:
                    self.lost += 1
                    return
                client.sendall(answer)


def test_a_win_whose_answer_was_lost_is_a_win(
    s3_env: Seaweed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = LosesAnswers(s3_env.endpoint)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        through = open_store(store.uri)
        assert through.put_if_absent("entry", b"mine") is True
        assert proxy.lost == 1, "the fault did happen"
        assert through.put_if_absent("entry", b"theirs") is False
    finally:
        proxy.close()
    assert store.get("entry") == b"mine"
