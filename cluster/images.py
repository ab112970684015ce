"""The one decoder of image files: training, the gate and serving call it, so they cannot differ.

The file's size in pixels is read from its header and checked before anything is decompressed. Of large
images one is decompressed at a time in a process, since each takes hundreds of megabytes while it lasts.

A whole and plain PNG of the very size and channels asked for takes a shorter way to the same bytes: its
chunks are walked here and handed to Pillow's decompressor at once. For small images that halves the time,
most of which goes to Pillow's Python. Whatever is not so plain, and all that is damaged, Pillow reads.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from cluster.errors import TandemError, TooLarge, Unprocessable, shown
from cluster.signature import ImageEncoding

MAX_PIXELS = 50_000_000
LARGE_PIXELS = 4_000_000
FORMATS = ("PNG", "JPEG")
_one_large_at_a_time = threading.Lock()
_PNG_BEGINS = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_PNG_HEADER_ENDS = 33
_PLAIN_PNG = {1: b"\x08\x00\0\0\0", 3: b"\x08\x02\0\0\0"}
"""By channels, how the header ends: 8 bits, grey or RGB, not interlaced."""


def decode(data: bytes, encoding: ImageEncoding, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file to `encoding`'s size and channels.

    Grey is ITU-R 601 luma, transparency is laid over black, and another size is resampled
    bilinearly without keeping the aspect ratio. A JPEG of more than 4 million pixels is first reduced
    while it is decompressed, to no less than twice the size asked for. A caller who decodes many files
    for one request gives each its share of the pixels as `max_pixels`.

    Returns:
        uint8 [height, width, channels], 0 to 255.

    Raises:
        Unprocessable: not a PNG or JPEG, or damaged.
        TooLarge: more than `max_pixels`.
    """
    size = encoding.width, encoding.height
    mode = "L" if encoding.channels == 1 else "RGB"
    if size[0] * size[1] <= min(max_pixels, LARGE_PIXELS):
        unpacked = _plain_png(data, mode, encoding)
        if unpacked is not None:
            return unpacked
    with _failures_explained(data):
        image = _opened(data, max_pixels)
        with _room_for(image, size):
            plain = _resized(image, size)
            if plain.mode != mode:  # a conversion to the same mode would copy
                plain = plain.convert(mode)
            pixels = np.asarray(plain, dtype=np.uint8)
    return pixels.reshape(encoding.height, encoding.width, encoding.channels)


def probe(data: bytes) -> ImageEncoding:
    """The size of a PNG or JPEG file, and whether it has colour, from its header alone.

    Raises:
        Unprocessable: not a PNG or JPEG.
        TooLarge: more than 50 million pixels.
    """
    with _failures_explained(data):
        image = _opened(data, MAX_PIXELS)
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        return ImageEncoding(height=image.height, width=image.width, channels=1 if grey else 3)


def _plain_png(data: bytes, mode: str, encoding: ImageEncoding) -> NDArray[np.uint8] | None:
    """The pixels of a PNG that needs unpacking and nothing else; None for every other file."""
    size = encoding.width, encoding.height
    header = _PNG_BEGINS + struct.pack(">II", *size) + _PLAIN_PNG.get(encoding.channels, b"")
    packed = _packed(data) if data.startswith(header) else None
    if packed is None:
        return None
    try:
        image = Image.frombytes(mode, size, packed, "zip", (mode, 0))
    except Exception:  # noqa: BLE001 - what is wrong with it, Pillow's reader says better
        return None
    return np.frombuffer(image.tobytes(), np.uint8).reshape(*size[::-1], encoding.channels)


def _packed(data: bytes) -> bytes | None:
    """The compressed pixels of a PNG that has whole IDAT chunks only; None where there is more, or less."""
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:_PNG_HEADER_ENDS], "big"):
        return None
    parts: list[bytes] = []
    start = _PNG_HEADER_ENDS
    while True:
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if kind == b"IEND":
            return b"".join(parts)
        if kind != b"IDAT":
            return None
        parts.append(data[start + 8 : end])
        start = end + 4


@contextlib.contextmanager
def _room_for(image: Image.Image, size: tuple[int, int]) -> Iterator[None]:
    """The turn of a large image; the others go at once."""
    pixels = image.width * image.height
    if pixels > LARGE_PIXELS:
        image.draft(None, (2 * size[0], 2 * size[1]))
        # A progressive file is held as a whole, however small the picture made of it.
        if "progressive" not in image.info:
            pixels = image.width * image.height
    if pixels <= LARGE_PIXELS:
        yield
        return
    with _one_large_at_a_time:
        yield


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image without transparency, in 8 bits, at `size`; full-size copies are made only where needed."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _over_black(image, size)
    if image.mode.startswith("I"):
        image = image.point(lambda v: v / 256).convert("L")  # 16 bits of grey
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return _scaled(image, size)


def _over_black(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Laid over black, one band at a time: compositing the whole would take three more copies of it."""
    layered = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    alpha = layered.getchannel("A")
    names = [name for name in layered.getbands() if name != "A"]
    bands = [_scaled(ImageChops.multiply(layered.getchannel(name), alpha), size) for name in names]
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


@contextlib.contextmanager
def _failures_explained(data: bytes) -> Iterator[None]:
    try:
        yield
    except (TandemError, MemoryError):
        raise
    except UnidentifiedImageError:  # its text holds an address in this process
        raise _undecodable(data, "not a file of these formats") from None
    except Exception as error:  # noqa: BLE001 - a damaged chunk makes Pillow's parsers raise anything
        raise _undecodable(data, shown(str(error) or type(error).__name__)) from None


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image, of which only the header was read, if it is small enough."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        size = f"{image.width} x {image.height}"
        if image.width * image.height <= max_pixels:
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limits are above ours. Its warning is not silenced, as that can't be done
        # safely while other threads decode; where warnings are errors, it arrives here.
        size = shown(str(error))
    raise TooLarge(
        "the image has too many pixels",
        got=size,
        allowed=f"at most {max_pixels:,} pixels",
        fix="send a smaller image",
    )


def _undecodable(data: bytes, why: str) -> Unprocessable:
    return Unprocessable(
        "the image can't be decoded",
        got=f"{len(data)} bytes: {why}",
        allowed=" or ".join(FORMATS),
        fix="check that the whole file was sent",
    )
