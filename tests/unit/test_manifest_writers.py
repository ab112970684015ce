"""Writers that follow one another: an older one never commits behind a newer one, and nothing comes twice."""

from pathlib import Path

import pytest

from cluster.artifacts import Artifacts
from cluster.errors import Conflict, StorageError
from cluster.manifest import FileEntry, Manifest, Writer
from cluster.storage import Store, memory_store

OLD, NEW = Writer(epoch=1, generation=4), Writer(epoch=2, generation=0)
ENTRY = {"f": FileEntry(key="f", size_bytes=0, sha256="0" * 64)}


@pytest.fixture
def store() -> Store:
    return memory_store()


@pytest.fixture
def artifacts(store: Store) -> Artifacts:
    return Artifacts(store, "runs/r/checkpoints", "checkpoint")


def publish(artifacts: Artifacts, number: int, nonce: str, writer: Writer) -> Manifest:
    return artifacts.publish(number, nonce, ENTRY, {"by": nonce}, writer)


def nothing_is_damaged(number: int, error: Exception) -> None:
    pytest.fail(f"{number}: {error}")


def test_writers_are_ordered_by_driver_then_generation() -> None:
    assert Writer(epoch=1, generation=9) < NEW <= NEW < Writer(epoch=2, generation=1)


def test_what_is_published_comes_back_with_its_writer(artifacts: Artifacts) -> None:
    written = publish(artifacts, 1, "a", OLD)
    assert artifacts.read(1) == written
    assert (written.writer, written.files, written.is_fence) == (OLD, ENTRY, False)


def test_a_number_that_an_older_writer_took_is_passed_over(artifacts: Artifacts) -> None:
    publish(artifacts, 1, "zombie", OLD)
    publish(artifacts, 2, "zombie again", OLD)
    assert publish(artifacts, 1, "b", NEW).number == 3


def test_an_older_writer_is_stopped_by_whatever_a_newer_one_wrote(artifacts: Artifacts) -> None:
    publish(artifacts, 1, "b", NEW)
    with pytest.raises(Conflict, match="newer writer"):
        publish(artifacts, 1, "a", OLD)
    with pytest.raises(Conflict):
        artifacts.fence(OLD)
    assert artifacts.head() == 1


def test_an_older_writer_is_stopped_by_a_fence_before_anything_was_published(artifacts: Artifacts) -> None:
    assert artifacts.fence(NEW).number == 1
    with pytest.raises(Conflict):
        publish(artifacts, 1, "a", OLD)
    assert publish(artifacts, 1, "b", NEW).number == 2


def test_readers_pass_over_fences_and_say_nothing(artifacts: Artifacts) -> None:
    assert artifacts.last() is None
    artifacts.fence(OLD)
    assert artifacts.last() is None
    assert artifacts.newest(lambda manifest: manifest, nothing_is_damaged) is None
    written = publish(artifacts, 2, "a", OLD)
    artifacts.fence(NEW)
    assert artifacts.last() == written
    assert artifacts.newest(lambda manifest: manifest, nothing_is_damaged) == (written, written)


def test_publishing_the_same_again_makes_no_second_one(artifacts: Artifacts) -> None:
    publish(artifacts, 1, "zombie", OLD)
    first = publish(artifacts, 1, "b", NEW)
    assert publish(artifacts, 1, "b", NEW) == first
    assert artifacts.head() == 2


def test_an_earlier_attempt_of_ones_own_is_no_other_writer(artifacts: Artifacts) -> None:
    publish(artifacts, 1, "a, whose answer was lost", NEW)
    assert publish(artifacts, 1, "b", NEW).number == 2


def test_after_an_answer_that_never_came_the_own_win_is_found(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(artifacts, 1, "zombie", OLD)
    create = Store.put_if_absent

    def lost(self: Store, key: str, data: bytes) -> bool:
        if create(self, key, data):
            raise StorageError("the answer was lost")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_if_absent", lost)
        with pytest.raises(StorageError):
            publish(artifacts, 1, "b", NEW)
    assert publish(artifacts, 1, "b", NEW).number == artifacts.head() == 2


def test_a_damaged_entry_stops_no_writer(store: Store, artifacts: Artifacts) -> None:
    publish(artifacts, 1, "a", NEW)
    store.put(artifacts.key(1), b"{}")
    assert artifacts.fence(OLD).number == 2  # nobody can tell who wrote entry 1
    assert publish(artifacts, 1, "b", NEW).number == 3
    with pytest.raises(Conflict):
        publish(artifacts, 1, "a", OLD)


def test_manifests_without_a_writer_count_as_the_oldest(tmp_path: Path, artifacts: Artifacts) -> None:
    artifacts.commit(1, {"f": b""}, {})
    assert publish(artifacts, 1, "a", Writer(epoch=0, generation=1)).number == 2


def test_a_manifest_that_names_no_writer_is_written_as_ever(store: Store, artifacts: Artifacts) -> None:
    artifacts.commit(1, {"f": b""}, {})
    text = store.get(artifacts.key(1)).decode()
    assert "writer" not in text
    assert "fence" not in text
