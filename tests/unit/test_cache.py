"""The disk cache: what is put is got back or is missing, within the limit, whoever is killed when."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from training.data import cache as cache_module
from training.data.cache import RowGroupCache

ONE_KIB_ROWS = 128


def table(n: int, rows: int = ONE_KIB_ROWS) -> pa.Table:
    words = pa.array([f"w{n}"] * rows, pa.large_string())
    return pa.table({"x": np.full(rows, n, np.int64), "word": words})


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.rows"))


def put_long_ago(cache: RowGroupCache, folder: Path, count: int) -> None:
    """Tables 0 to `count`, put one after the other, before any other cache was opened."""
    seen: set[Path] = set()
    for n in range(count):
        cache.put(str(n), table(n))
        (new,) = set(folder.glob("*.rows")) - seen
        seen.add(new)
        os.utime(new, (n, n))  # the file system's clock may not tell one from the next


def test_what_is_put_is_got_back_by_another_process_too(tmp_path: Path) -> None:
    mine = RowGroupCache(tmp_path / "c", 10**6)
    mine.put("a", table(1))
    assert mine.get("a") == table(1) == RowGroupCache(tmp_path / "c", 10**6).get("a")
    assert mine.get("b") is None
    assert (mine.hits, mine.misses) == (1, 1)


def test_the_oldest_goes_first_and_a_use_makes_it_young(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    put_long_ago(RowGroupCache(folder, 10**6), folder, 4)
    one = stored_bytes(folder) // 4
    second = RowGroupCache(folder, one * 4)
    assert second.get("0") == table(0)
    second.put("4", table(4))
    assert {n for n in range(5) if second.get(str(n))} == {0, 2, 3, 4}
    assert stored_bytes(folder) <= one * 4


def test_what_is_in_use_is_not_thrown_out_for_more_of_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    RowGroupCache(folder, 10**6).put("probe", table(0))
    one = stored_bytes(folder)
    (next(folder.glob("*.rows"))).unlink()
    cache = RowGroupCache(folder, one * 3)
    for _ in range(2):
        for n in range(10):
            if cache.get(str(n)) is None:
                cache.put(str(n), table(n))
    assert [n for n in range(10) if cache.get(str(n))] == [0, 1, 2]
    assert stored_bytes(folder) == one * 3


@pytest.mark.parametrize("damage", ["short", "long", "empty", "garbage"])
def test_a_file_of_another_size_is_dropped(tmp_path: Path, damage: str) -> None:
    cache = RowGroupCache(tmp_path / "c", 10**6)
    cache.put("a", table(1))
    path = next((tmp_path / "c").glob("*.rows"))
    data = path.read_bytes()
    path.write_bytes({"short": data[:-9], "long": data + b"x", "empty": b"", "garbage": b"g" * 200}[damage])
    assert cache.get("a") is None
    assert not path.exists()
    cache.put("a", table(1))
    assert cache.get("a") == table(1)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache = RowGroupCache(tmp_path / "c", 10**6)
    cache.put("a", table(1))
    path = next((tmp_path / "c").glob("*.rows"))
    whole = path.read_bytes()
    for place in (len(whole) - 600, len(whole) // 2, 70):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert cache.get("a") is None
        assert not path.exists()
    cache.put("a", table(1))
    assert cache.get("a") == table(1)


def test_a_writer_that_is_stopped_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer may be stopped in the middle of a write; others go on without the cache."""
    monkeypatch.setattr(cache_module, "_TURN_WITHIN_S", 0.05)
    cache = RowGroupCache(tmp_path / "c", 10**6)
    cache.put("before", table(0))
    stopped = os.open(tmp_path / "c" / "lock", os.O_RDWR)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    theirs = cache._path("a").with_suffix(".part")
    theirs.write_bytes(b"half of what it was going to write")
    cache.put("a", table(1))
    assert theirs.exists()
    assert cache.get("a") is None
    assert cache.get("before") == table(0)
    assert RowGroupCache.open(10**6, {"TANDEM_CACHE_DIR": str(tmp_path)}) is not None  # another folder
    with pytest.raises(OSError, match="turn"):
        RowGroupCache(tmp_path / "c", 10**6)
    os.close(stopped)
    RowGroupCache(tmp_path / "c", 10**6).put("a", table(1))
    assert cache.get("a") == table(1)


def test_another_boot_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot").write_text("one")
    monkeypatch.setattr(cache_module, "_BOOT_ID", tmp_path / "boot")
    RowGroupCache(tmp_path / "c", 10**6).put("a", table(1))
    (tmp_path / "boot").write_text("two")
    assert RowGroupCache(tmp_path / "c", 10**6).get("a") is None


def test_a_full_disk_means_going_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowGroupCache(tmp_path / "c", 10**6)
    cache.put("before", table(0))

    def full(path: Path, header: bytes, _: pa.Buffer) -> None:
        path.write_bytes(header)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_write", full)
        cache.put("a", table(1))
    assert cache.get("a") is None
    assert cache.get("before") == table(0)
    assert not list((tmp_path / "c").glob("*.part"))


def test_where_it_is_and_where_it_is_not(tmp_path: Path) -> None:
    cache = RowGroupCache.open(10**6, {"TANDEM_CACHE_DIR": str(tmp_path / "here")}, tmp_path)
    assert cache is not None
    assert list((tmp_path / "here").iterdir())
    assert RowGroupCache.open(10**6, {}, tmp_path) is not None
    assert (tmp_path / ".cache" / "tandem").is_dir()
    assert RowGroupCache.open(0, {}, tmp_path) is None
    (tmp_path / "file").write_text("")
    assert RowGroupCache.open(10**6, {"TANDEM_CACHE_DIR": str(tmp_path / "file")}) is None
    open_to_all = tmp_path / "here" / f"rows-1-{os.geteuid()}"
    open_to_all.chmod(0o777)
    assert RowGroupCache.open(10**6, {"TANDEM_CACHE_DIR": str(tmp_path / "here")}) is None


WRITER = """
import sys, numpy as np, pyarrow as pa
from pathlib import Path
from training.data.cache import RowGroupCache
folder, limit, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(seed)
print("began", flush=True)
while True:
    cache = RowGroupCache(folder, limit)
    for _ in range(20):
        n = int(rng.integers(0, 60))
        table = pa.table({"x": np.full(20_000, n, np.int64)})
        found = cache.get(str(n))
        assert found is None or found == table, n
        if found is None:
            cache.put(str(n), table)
"""


def test_writers_that_are_killed_leave_nothing_half_and_nothing_over(tmp_path: Path) -> None:
    folder, limit = tmp_path / "c", 25 * 160_000
    for seed in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), str(limit), str(10 * seed + k)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for k in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "began\n"
        for k, writer in enumerate(writers):
            try:
                writer.wait(0.1 + 0.05 * k)  # how far they get doesn't matter
            except subprocess.TimeoutExpired:
                writer.send_signal(signal.SIGKILL)
            _, said = writer.communicate(timeout=10)
            assert writer.returncode == -signal.SIGKILL, said
        assert stored_bytes(folder) <= limit
    cache = RowGroupCache(folder, limit)
    for n in range(60):
        found = cache.get(str(n))
        assert found is None or found == pa.table({"x": np.full(20_000, n, np.int64)})
