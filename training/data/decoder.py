"""The program that decodes image files for a trainer beside it: `python -m training.data.decoder`.

Its standard input is a stream socket, on which requests come and answers go, one after another:

    request     rows, height, width, channels, data bytes as five int64; the size of each file as
                int64 [rows]; the files, end to end
    answer      int64 0, then the pixels, uint8 [rows, height, width, channels]; or else the length
                of a JSON object {place, failed, got, allowed}: the first file that can't be decoded

Before the first request it says 0 once, for that it is ready. It ends when the trainer hangs up, and
so also when the trainer is killed; signals sent to the whole group it leaves to the trainer.

Knows nothing of Parquet, batches or tasks, and never imports torch: it should start fast and stay small.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import images
from cluster.errors import TandemError
from cluster.signature import ImageEncoding

REQUEST = struct.Struct("<5q")
ANSWER = struct.Struct("<q")
MAX_TROUBLE_BYTES = 64 * 1024


class BadImage(Exception):
    """File number `place` can't be decoded; the other parts are those of the decoder's own error."""

    def __init__(self, place: int, failed: str, got: str, allowed: str) -> None:
        super().__init__(failed)
        self.place = place
        self.failed = failed
        self.got = got
        self.allowed = allowed


def decode_files(files: Sequence[bytes], encoding: ImageEncoding, pixels: NDArray[np.uint8]) -> None:
    """Decode files into `pixels`: uint8 [len(files), height, width, channels].

    Raises:
        BadImage: the first that isn't an image.
    """
    for place, data in enumerate(files):
        try:
            pixels[place] = images.decode(data, encoding)
        except TandemError as error:
            raise BadImage(place, error.failed, error.got, error.allowed) from None


def receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fill `target`, of bytes, with what comes.

    Raises:
        EOFError: the other side hung up first.
    """
    while len(target):
        count = connection.recv_into(target)
        if not count:
            raise EOFError("the other side hung up")
        target = target[count:]


def received(connection: socket.socket, count: int) -> bytearray:
    """The next `count` bytes. Raises as `receive_into`."""
    data = bytearray(count)
    receive_into(connection, memoryview(data))
    return data


def serve(connection: socket.socket) -> None:
    """Answer requests.

    Raises:
        EOFError: there are no more.
    """
    connection.sendall(ANSWER.pack(0))
    while True:
        rows, height, width, channels, size = REQUEST.unpack(received(connection, REQUEST.size))
        encoding = ImageEncoding(height=height, width=width, channels=channels)
        ends = np.cumsum(np.frombuffer(received(connection, 8 * rows), np.int64)).tolist()
        data = bytes(received(connection, size))
        files = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        pixels = np.empty((rows, height, width, channels), np.uint8)
        try:
            decode_files(files, encoding, pixels)
        except BadImage as error:
            _tell(connection, place=error.place, failed=error.failed, got=error.got, allowed=error.allowed)
        else:
            connection.sendall(ANSWER.pack(0))
            connection.sendall(pixels.reshape(-1).data)


def _tell(connection: socket.socket, **trouble: Any) -> None:
    text = json.dumps(trouble).encode()
    connection.sendall(ANSWER.pack(len(text)) + text)


def main() -> None:
    """Serve the socket that is standard input."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer ended
        serve(socket.socket(fileno=0))


if __name__ == "__main__":
    main()
