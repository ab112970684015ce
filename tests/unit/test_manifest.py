"""Artifacts: nothing exists before its manifest, and nothing damaged is ever loaded."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.artifacts import Artifacts
from cluster.errors import Conflict, Damaged, NotFound, StorageError
from cluster.manifest import Manifest, read_file
from cluster.storage import Store, memory_store, open_store

FILES = {"weights": bytes(range(256)) * 40, "empty": b"", "nested/name.json": b"{}"}


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path))


def checkpoints(store: Store) -> Artifacts:
    return Artifacts(store, "runs/r/checkpoints", "checkpoint")


def load_all(artifacts: Artifacts, passed_over: list[int]) -> int | None:
    def load(manifest: Manifest) -> dict[str, bytes]:
        return {name: artifacts.read_file(manifest, name) for name in manifest.files}

    found = artifacts.newest(load, lambda number, _: passed_over.append(number))
    if found is None:
        return None
    manifest, files = found
    assert files == FILES
    return manifest.number


def test_what_is_committed_comes_back(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "local file"
    path.write_bytes(FILES["weights"])
    written = checkpoints(store).commit(1, {**FILES, "weights": path}, {"step": 7})
    assert checkpoints(store).read(1) == written
    assert written.meta == {"step": 7}
    assert load_all(checkpoints(store), []) == 1
    assert checkpoints(store).head() == 1


def test_nothing_exists_before_its_manifest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> bool:
        raise StorageError("died before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_if_absent", die)
        with pytest.raises(StorageError):
            checkpoints(store).commit(1, FILES, {})
    assert store.keys("runs/r/checkpoints"), "the files are there"
    assert checkpoints(store).head() == 0
    assert load_all(checkpoints(store), []) is None
    checkpoints(store).commit(1, FILES, {})
    assert load_all(checkpoints(store), []) == 1


def test_a_failed_file_leaves_no_manifest(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        checkpoints(store).commit(1, {**FILES, "gone": tmp_path / "gone"}, {})
    assert checkpoints(store).head() == 0


def test_of_sixteen_racing_writers_one_commits_whole(store: Store) -> None:
    together = Barrier(16)

    def commit(writer: int) -> bool:
        together.wait(10)
        try:
            checkpoints(store).commit(1, {"who": b"%d" % writer}, {"writer": writer})
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(commit, range(16)))
    assert won.count(True) == 1
    manifest = checkpoints(store).read(1)
    assert manifest.meta["writer"] == won.index(True)
    assert read_file(store, manifest, "who") == b"%d" % won.index(True)


@pytest.mark.parametrize("what", ["truncated", "longer", "flipped", "missing", "emptied"])
def test_a_damaged_file_is_seen_and_fallen_back_from(store: Store, what: str) -> None:
    artifacts = checkpoints(store)
    for number in (1, 2, 3):
        artifacts.commit(number, FILES, {})
    for number in (2, 3):
        damage(store, artifacts.read(number).files["weights"].key, what)
    passed_over: list[int] = []
    assert load_all(artifacts, passed_over) == 1
    assert passed_over == [3, 2]
    with pytest.raises((Damaged, NotFound)):
        artifacts.read_file(artifacts.read(3), "weights")


def damage(store: Store, key: str, what: str) -> None:
    data = store.get(key)
    if what == "missing":
        store.delete([key])
    else:
        flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        changed = {"truncated": data[:-1], "longer": data + b"\0", "flipped": flipped, "emptied": b""}
        store.put(key, changed[what])


@pytest.mark.parametrize(
    "bytes_", [b"", b"{", b"null", b"[]", b'{"format": 2}', b"\xff\xfe", b'{"format":1,"kind":"checkpoint"}']
)
def test_a_damaged_manifest_is_fallen_back_from(store: Store, bytes_: bytes) -> None:
    artifacts = checkpoints(store)
    artifacts.commit(1, FILES, {})
    artifacts.commit(2, FILES, {})
    store.put("runs/r/checkpoints/00000002/manifest.json", bytes_)
    passed_over: list[int] = []
    assert load_all(artifacts, passed_over) == 1
    assert passed_over == [2]


@given(st.data())
def test_any_single_changed_byte_of_a_manifest_is_survived(data: st.DataObject) -> None:
    store = memory_store()
    artifacts = checkpoints(store)
    artifacts.commit(1, FILES, {})
    artifacts.commit(2, FILES, {})
    key = "runs/r/checkpoints/00000002/manifest.json"
    text = bytearray(store.get(key))
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    store.put(key, bytes(text))
    load_all(artifacts, [])  # asserts that what is loaded is what was written


def test_a_manifest_of_another_kind_or_number_is_damage(store: Store) -> None:
    checkpoints(store).commit(1, FILES, {})
    servables = Artifacts(store, "runs/r/checkpoints", "servable")
    with pytest.raises(Damaged):
        servables.read(1)
    store.put(
        "runs/r/checkpoints/00000002/manifest.json", store.get("runs/r/checkpoints/00000001/manifest.json")
    )
    with pytest.raises(Damaged):
        checkpoints(store).read(2)


def test_an_unreachable_store_is_not_taken_for_damage(store: Store) -> None:
    checkpoints(store).commit(1, FILES, {})

    def load(manifest: Manifest) -> None:
        raise StorageError("unreachable")

    with pytest.raises(StorageError, match="unreachable"):
        checkpoints(store).newest(load, lambda number, error: pytest.fail("passed over"))


def test_a_file_that_the_manifest_does_not_list(store: Store) -> None:
    with pytest.raises(NotFound, match="has no file 'other'"):
        read_file(store, checkpoints(store).commit(1, FILES, {}), "other")
