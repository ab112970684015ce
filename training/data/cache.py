"""Row groups of a remote dataset, kept on this machine's disk up to a number of bytes.

One file for each row group and choice of columns: a header of 64 bytes, then the table as an Arrow
stream, uncompressed, so that reading it back costs no more than a copy. Several processes may share
a folder, and any may be killed at any point:

- a file is written under another name and renamed when it is complete; its header says how long it is
  and what its words add up to, so a file that was cut or changed on the disk is read from afar again;
- writers take turns under a lock of the kernel's, which a killed process lets go of; for one that is
  stopped the others don't wait long, they go on without writing;
- the kernel's boot id is part of each name, because a file that was complete when the machine went
  down may not have reached the disk;
- readers read, they don't map, so that a file that goes away meanwhile is an error and not a signal.

When there is no room, what was used longest ago goes first, but nothing that was used since this
cache was opened: an epoch reads each row group once, in an order of its own, so to throw out one for
another would only cost the writing. A disk that is full, or a folder that can't be used, means going
on without.

Knows nothing of Parquet or stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.clock import SYSTEM_CLOCK, Clock

ENVIRONMENT = "TANDEM_CACHE_DIR"
_MAGIC = b"TANDEM2\n"
_HEADER = struct.Struct("<8sQQ40x")
"""Magic, size of the whole file in bytes, `_sum` of what follows the header."""
_TURN_WITHIN_S = 5.0
_TURN_EVERY_S = 0.01
_SPARED_SHARE_OF_DISK = 0.02
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RowGroupCache:
    """Tables by key. Safe to use from several threads and processes.

    Args:
        folder: its own; made if it isn't there.
        limit_bytes: how much all files in it may take together.

    Raises:
        OSError: the folder can't be used.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Clock = SYSTEM_CLOCK) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} may be written to by others")
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        self._full = False
        self.hits = 0
        self.misses = 0
        with self._turn() as turn:
            os.utime(turn)  # by the file system's own clock, like all that it is compared with
            self._opened_ns = os.fstat(turn).st_mtime_ns

    @classmethod
    def open(
        cls, limit_bytes: int, environment: Mapping[str, str] = os.environ, home: Path | None = None
    ) -> RowGroupCache | None:
        """The cache in `TANDEM_CACHE_DIR`, or else in ~/.cache/tandem; None where it can't be used."""
        chosen = environment.get(ENVIRONMENT)
        try:
            root = Path(chosen) if chosen else (home or Path.home()) / ".cache" / "tandem"
            return cls(root / f"rows-1-{os.geteuid()}", limit_bytes) if limit_bytes > 0 else None
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            return None

    def get(self, key: str) -> pa.Table | None:
        """The table that was put under `key`, if it is there, whole."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = pa.allocate_buffer(size)
                read = file.readinto(memoryview(data))
                content = data.slice(_HEADER.size)
                if read != size or _HEADER.unpack_from(data) != (_MAGIC, size, _sum(content)):
                    raise ValueError("not what was written")
                os.utime(file.fileno())
            table = pa.ipc.open_stream(content).read_all()
        except FileNotFoundError:
            self.misses += 1
            return None
        except (OSError, ValueError, struct.error, pa.ArrowException):
            with contextlib.suppress(OSError):
                path.unlink()
            self.misses += 1
            return None
        self.hits += 1
        return table

    def put(self, key: str, table: pa.Table) -> None:
        """Keep a table, if there is room."""
        path = self._path(key)
        if self._full or table.nbytes > self._limit_bytes or path.exists():
            return
        content = _packed(table)
        size = _HEADER.size + content.size
        try:
            with self._turn() as turn:
                if path.exists():
                    return
                if not self._make_room(turn, size):
                    self._full = True
                    return
                part = path.with_suffix(".part")
                try:
                    _write(part, _HEADER.pack(_MAGIC, size, _sum(content)), content)
                    part.rename(path)
                except OSError:
                    part.unlink(missing_ok=True)
                    raise
        except OSError:
            self._full = True

    def _path(self, key: str) -> Path:
        return self._folder / (hashlib.sha256(f"{self._boot}\n{key}".encode()).hexdigest() + ".rows")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[int]:
        """One writer at a time on this machine. Gives the lock file, which holds the total in bytes.

        Raises:
            OSError: the folder can't be used, or someone who doesn't end has the turn.
        """
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take(lock, self._clock)
            yield lock
        finally:
            os.close(lock)

    def _make_room(self, turn: int, size: int) -> bool:
        disk = shutil.disk_usage(self._folder)
        if disk.free < size + disk.total * _SPARED_SHARE_OF_DISK:
            return False
        noted = os.pread(turn, 32, 0)
        total = int(noted) if noted.strip().isdigit() else self._limit_bytes
        if total + size > self._limit_bytes:
            total = self._evict(size)
        if total + size > self._limit_bytes:
            return False
        # Noted before the file is there: after a kill the total is too high, and is counted anew in time.
        os.pwrite(turn, b"%-32d" % (total + size), 0)
        return True

    def _evict(self, size: int) -> int:
        """Delete what was used longest ago until `size` more bytes fit; how many there are then."""
        files = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".part"):  # a killed writer's: whoever has the turn has none yet
                os.unlink(entry.path)
            elif entry.name.endswith(".rows"):
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    files.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(file[1] for file in files)
        for used_ns, file_bytes, path in sorted(files):
            if total + size <= self._limit_bytes or used_ns >= self._opened_ns:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= file_bytes
        return total


def _take(lock: int, clock: Clock) -> None:
    until_s = clock.monotonic_s() + _TURN_WITHIN_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if clock.monotonic_s() >= until_s:
                raise TimeoutError("another writer keeps the turn; it may be stopped") from None
        clock.sleep(_TURN_EVERY_S)


def _packed(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _write(path: Path, header: bytes, content: pa.Buffer) -> None:
    with pa.OSFile(str(path), "wb") as sink:
        sink.write(header)
        sink.write(content)


def _sum(content: pa.Buffer) -> int:
    """Its words added up, modulo 2**64: any one changed bit changes it, at the speed of memory."""
    words, rest = divmod(content.size, 8)
    numbers = np.frombuffer(content, "<u8", words) if words else np.empty(0, np.uint64)
    tail = int.from_bytes(memoryview(content)[content.size - rest :], "little")
    return (int(np.add.reduce(numbers, dtype=np.uint64)) + tail) % 2**64
