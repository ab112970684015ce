"""A node's cache of prepared graphs: made once, shared, evicted when idle, and never left half made."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servables import GATHER, MLP, gather_graph, mlp_graph, publish

from cluster import node_folder as node_folders
from cluster.errors import Damaged
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import open_store
from serving import runtimes
from serving.runtimes import load_runtime
from serving.runtimes.node_cache import NodeCache

PAGE = 4096


def filler(size_bytes: int, calls: list[int] | None = None) -> Any:
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(size_bytes)
        (folder / "weights.bin").write_bytes(b"x" * size_bytes)

    return make


def test_an_entry_is_made_once_and_found_again(tmp_path: Path) -> None:
    cache, calls = NodeCache(tmp_path, 10**9), []
    for _ in range(3):
        with cache.hold("one", filler(10, calls), needs_bytes=10) as held:
            assert (held.folder / "weights.bin").read_bytes() == b"x" * 10
    assert calls == [10]


def test_what_was_used_longest_ago_goes_unless_it_is_in_use(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10 * PAGE)
    held = cache.hold("in-use", filler(4 * PAGE), needs_bytes=4 * PAGE)
    cache.hold("old", filler(4 * PAGE), needs_bytes=4 * PAGE).release()
    os.utime(tmp_path / "in-use", (1, 1))
    cache.hold("new", filler(4 * PAGE), needs_bytes=4 * PAGE).release()
    assert set(cache.sizes_bytes()) == {"in-use", "new"}
    with pytest.raises(OSError, match="room"):
        cache.hold("too-large", filler(1), needs_bytes=8 * PAGE)
    held.release()
    held.release()
    cache.hold("large", filler(8 * PAGE), needs_bytes=8 * PAGE).release()
    assert set(cache.sizes_bytes()) == {"large"}


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10**9)

    def fails(folder: Path) -> None:
        (folder / "part").write_bytes(b"x")
        raise Damaged("not what was written")

    with pytest.raises(Damaged):
        cache.hold("one", fails, needs_bytes=1)
    assert cache.sizes_bytes() == {}
    cache.hold("one", filler(1), needs_bytes=1).release()


def test_what_a_killed_maker_left_is_made_anew(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "part").write_bytes(b"x")
        os._exit(1)

    cache = NodeCache(tmp_path, 10**9)
    child = multiprocessing.get_context("fork").Process(target=lambda: cache.hold("one", dies, needs_bytes=1))
    child.start()
    child.join(20)
    assert child.exitcode == 1
    assert set(cache.sizes_bytes()) == {"one.tmp"}
    with cache.hold("one", filler(3), needs_bytes=3) as held:
        assert [path.name for path in held.folder.iterdir()] == ["weights.bin"]


def test_processes_that_come_at_once_make_it_once(tmp_path: Path) -> None:
    made = tmp_path / "made"

    def make(folder: Path) -> None:
        with made.open("a") as file:
            file.write("x")
        (folder / "weights.bin").write_bytes(b"x")

    cache = NodeCache(tmp_path / "cache", 10**9)
    (tmp_path / "cache").mkdir()
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=lambda: cache.hold("one", make, needs_bytes=1).release()) for _ in range(6)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 6
    assert made.read_text() == "x"


def test_a_large_graph_is_prepared_once_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "LARGE_BYTES", 1)
    store = open_store(str(tmp_path / "store"))
    publish(store, "m", mlp_graph(3), MLP)
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = NodeCache(folder, 10**9)
    registry = Registry(store)
    manifest, signature = registry.servable(registry.resolve(ModelRef("m", "live")))
    plain = load_runtime(store, manifest, signature, threads=1)
    shared = [load_runtime(store, manifest, signature, threads=1, cache=cache) for _ in range(2)]
    assert len(cache.sizes_bytes()) == 1
    inputs = {"x": np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)}
    expected = plain.run(inputs)
    for runtime in shared:
        answer = runtime.run(inputs)
        assert list(answer["label"]) == list(expected["label"])
        np.testing.assert_allclose(answer["probabilities"], expected["probabilities"], rtol=1e-5)
        runtime.close()


def test_a_damaged_graph_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "LARGE_BYTES", 1)
    store = open_store(str(tmp_path / "store"))
    publish(store, "m", gather_graph(), GATHER)
    folder = tmp_path / "cache"
    folder.mkdir()
    registry = Registry(store)
    manifest, signature = registry.servable(registry.resolve(ModelRef("m", "live")))
    store.put(manifest.files["graph.onnx"].key, b"other bytes")
    with pytest.raises(Damaged, match="not what was written"):
        load_runtime(store, manifest, signature, threads=1, cache=NodeCache(folder, 10**9))
    assert NodeCache(folder, 1).sizes_bytes() == {}


def test_without_room_each_replica_reads_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "LARGE_BYTES", 1)
    store = open_store(str(tmp_path / "store"))
    publish(store, "m", gather_graph(), GATHER)
    folder = tmp_path / "cache"
    folder.mkdir()
    registry = Registry(store)
    manifest, signature = registry.servable(registry.resolve(ModelRef("m", "live")))
    runtime = load_runtime(store, manifest, signature, threads=1, cache=NodeCache(folder, 1))
    assert runtime.run({"index": np.array([3])})["value"].tolist() == [30.0]


def test_a_folder_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(node_folders.ENVIRONMENT, str(tmp_path))
    assert node_folders.node_folder("graphs") == tmp_path / "graphs"
    (tmp_path / "graphs").chmod(0o777)
    with pytest.raises(PermissionError):
        node_folders.node_folder("graphs")
