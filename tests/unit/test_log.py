"""The log: contiguous, found by probing, and no race loses or doubles an entry."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Conflict, NotFound
from cluster.log import Log
from cluster.storage import Store, memory_store, open_store


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path))


class Counted(Log):
    """A log of `size` entries that counts how often it is looked into."""

    def __init__(self, size: int) -> None:
        super().__init__(memory_store(), "log")
        self.size = size
        self.looks = 0

    def has(self, number: int) -> bool:
        self.looks += 1
        return 1 <= number <= self.size


@given(size=st.integers(0, 10**7), known_share=st.floats(0, 1))
def test_the_head_is_found_at_every_size_in_few_looks(size: int, known_share: float) -> None:
    log = Counted(size)
    known = int(size * known_share)
    assert log.head(known) == size
    assert log.looks <= 2 * (size - known + 1).bit_length() + 1


@pytest.mark.parametrize("size", range(70))
def test_the_head_is_found_at_every_small_size(size: int) -> None:
    for known in range(size + 1):
        assert Counted(size).head(known) == size


def test_nothing_new_costs_one_look() -> None:
    log = Counted(1000)
    log.head(1000)
    assert log.looks == 1


def test_racing_writers_lose_nothing_and_see_one_order(store: Store) -> None:
    def write(writer: int) -> tuple[int, bytes]:
        return Log(store, "log").append(lambda number, before: b"%d by %d" % (number, writer))

    with ThreadPoolExecutor(16) as pool:
        got = sorted(pool.map(write, range(32)))
    log = Log(store, "log")
    assert [number for number, _ in got] == list(range(1, 33))
    assert [log.read(number) for number, _ in got] == [data for _, data in got]
    assert len({data.split(b" by ")[1] for _, data in got}) == 32


def test_make_sees_the_entry_before_its_own(store: Store) -> None:
    log = Log(store, "log/", ".txt")
    log.append(lambda number, before: b"%d after %s" % (number, before or b"nothing"))
    assert log.append(lambda number, before: b"%d after %s" % (number, before or b"nothing")) == (
        2,
        b"2 after 1 after nothing",
    )
    assert log.key(2) == "log/00000002.txt"


def test_what_make_raises_leaves_nothing(store: Store) -> None:
    log = Log(store, "log")
    with pytest.raises(ZeroDivisionError):
        log.append(lambda number, before: b"%d" % (1 // 0))
    assert log.head() == 0
    with pytest.raises(NotFound):
        log.read(1)


def test_losing_for_ever_is_a_conflict() -> None:
    store = memory_store()
    log = Log(store, "log")

    def lose(number: int, before: bytes | None) -> bytes:
        store.put(log.key(number), b"someone else")
        return b"mine"

    with pytest.raises(Conflict, match="kept winning"):
        log.append(lose)
