"""Many small image files to pixels, in processes beside this one.

Of an image of 28 x 28 pixels, decompressing takes a fifth of the time; the rest is Python, which
threads can't share and which would take the interpreter from the training loop. So files go to
processes of `training.data.decoder` and pixels come back, over a socket, straight into the batch's
memory: neither side holds the interpreter while bytes move.

Which process decodes what has no say in the result. Processes start in the background; until one is
ready, and whenever one is lost, hangs or can't be started, the asking thread decodes for itself.

Tried and left out (per PNG of 28 x 28 and 700 bytes, on two cores): cv2.imdecode in two threads takes
10.3 us, and two of these processes 11.3 to 12.5 us with Pillow alone, so 60 MB of a second decoder, which
would have to agree with the first, buy little; Pillow in two threads, 48 us, is slower than in one, 34 us;
malloc's and Pillow's own memory settings change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.signature import ImageEncoding
from training.data.decoder import (
    ANSWER,
    MAX_TROUBLE_BYTES,
    REQUEST,
    BadImage,
    decode_files,
    receive_into,
    received,
)

_SOURCES = Path(__file__).resolve().parents[2]
_BUFFER_BYTES = 1024 * 1024
_ENDS_WITHIN_S = 10.0
_ANSWERS_WITHIN_S = 60.0
"""Or is stopped, or starved: a job is some dozens of small images, of a fraction of a millisecond each."""
_TIMEVAL = struct.Struct("@ll")

Decode = Callable[[pa.ChunkedArray, ImageEncoding, NDArray[np.uint8]], None]
"""Decodes a column of files, of large_binary, into uint8 [rows, height, width, channels].

Raises:
    BadImage: the first file that can't be decoded; a missing one can't.
"""


def decode_here(files: pa.ChunkedArray, encoding: ImageEncoding, pixels: NDArray[np.uint8]) -> None:
    """A `Decode` in the calling thread."""
    decode_files([data or b"" for data in files.to_pylist()], encoding, pixels)


class Decoders:
    """Processes that decode. Close it; they also end with this process, however it ends.

    Args:
        count: how many; they start at once, and nobody waits for them.
    """

    def __init__(self, count: int) -> None:
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._started: list[_Process] = []
        with contextlib.suppress(OSError):  # no more processes, files or memory to be had
            for _ in range(count):
                self._started.append(_Process())
        self._waiting = [
            threading.Thread(target=self._admit, args=(process,), name="tandem-decoder", daemon=True)
            for process in self._started
        ]
        for thread in self._waiting:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """The processes, in no order that means anything."""
        return [process.pid for process in self._started]

    def wait_until_ready(self) -> None:
        """Until every process is ready or lost."""
        for thread in self._waiting:
            thread.join()

    def decode(self, files: pa.ChunkedArray, encoding: ImageEncoding, pixels: NDArray[np.uint8]) -> None:
        """A `Decode`, in whatever process is idle, or else here."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            decode_here(files, encoding, pixels)
            return
        try:
            process.decode(files, encoding, pixels)
        except (EOFError, OSError):  # it was killed, perhaps for want of memory, or it hangs
            process.close(0)
            decode_here(files, encoding, pixels)
            return
        except BaseException as error:
            # After an answer that names a bad file the line is free again; after anything else it isn't.
            if isinstance(error, BadImage):
                self._idle.put(process)
            else:
                process.close(0)
            raise
        self._idle.put(process)

    def close(self) -> None:
        """End the processes; nobody may be decoding. May be called twice."""
        self._closing.set()
        for process in self._started:
            process.close()
        self.wait_until_ready()

    def _admit(self, process: _Process) -> None:
        if process.is_ready() and not self._closing.is_set():
            self._idle.put(process)


class _Process:
    """One process and the line to it."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as unless_started:
            self._line, theirs = socket.socketpair()
            unless_started.enter_context(self._line)
            with theirs:
                for end in (self._line, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                path = os.pathsep.join(p for p in (str(_SOURCES), os.environ.get("PYTHONPATH")) if p)
                self._process = subprocess.Popen(
                    # -P: the folder where the trainer stands may hold a package called `training` too.
                    [sys.executable, "-P", "-m", "training.data.decoder"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path},
                )
            unless_started.pop_all()
        self._closing = threading.Lock()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def is_ready(self) -> bool:
        """Wait for its first word, however long it takes to start; False if it ended instead."""
        try:
            first = received(self._line, ANSWER.size)
            # The kernel's own time-outs: Python's would ask, before each transfer, whether it may begin.
            limit = _TIMEVAL.pack(int(_ANSWERS_WITHIN_S), int(_ANSWERS_WITHIN_S % 1 * 1e6))
            for side in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._line.setsockopt(socket.SOL_SOCKET, side, limit)
        except (EOFError, OSError):
            return False
        return not any(first)

    def decode(self, files: pa.ChunkedArray, encoding: ImageEncoding, pixels: NDArray[np.uint8]) -> None:
        """One request and its answer.

        Raises:
            BadImage: a file can't be decoded.
            EOFError, OSError: the process is lost, or gave no sign of life for a minute.
        """
        sizes, parts = _raw(files)
        size = sum(len(part) for part in parts)
        shape = encoding.height, encoding.width, encoding.channels
        self._line.sendall(REQUEST.pack(len(files), *shape, size) + sizes.tobytes())
        for part in parts:
            self._line.sendall(part)
        (trouble_bytes,) = ANSWER.unpack(received(self._line, ANSWER.size))
        if not 0 <= trouble_bytes <= MAX_TROUBLE_BYTES:
            raise OSError(f"an answer of {trouble_bytes} bytes")
        if trouble_bytes:
            raise BadImage(**json.loads(received(self._line, trouble_bytes)))
        receive_into(self._line, pixels.reshape(-1).data)

    def close(self, ends_within_s: float = _ENDS_WITHIN_S) -> None:
        with self._closing:
            # Not only closed: a thread that reads from it must wake.
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
            self._line.close()
            try:
                self._process.wait(ends_within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _raw(files: pa.ChunkedArray) -> tuple[NDArray[np.int64], Sequence[Any]]:
    """The size of each file, and their bytes, as parts of Arrow's own memory. A missing file is empty."""
    sizes, parts = [np.empty(0, np.int64)], []
    for chunk in files.chunks:
        whole = chunk.fill_null(b"") if chunk.null_count else chunk
        _, offsets, data = whole.buffers()
        ends = np.frombuffer(offsets, np.int64)[whole.offset : whole.offset + len(whole) + 1]
        sizes.append(np.diff(ends))
        if data is not None and ends[-1] > ends[0]:
            parts.append(memoryview(data)[int(ends[0]) : int(ends[-1])])
    return np.concatenate(sizes), parts
