"""The one decoder of image files: training, the gate and serving call it, so they cannot differ.

The file's size in pixels is read from its header and checked before anything is decompressed.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cluster.errors import TooLarge, Unprocessable, shown
from cluster.signature import ImageEncoding

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG")


def decode(data: bytes, encoding: ImageEncoding, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file to `encoding`'s size and channels.

    Grey is ITU-R 601 luma, transparency is laid over black, and another size is resampled
    bilinearly without keeping the aspect ratio. A caller who decodes many files for one request gives
    each its share of the pixels as `max_pixels`.

    Returns:
        uint8 [height, width, channels], 0 to 255.

    Raises:
        Unprocessable: not a PNG or JPEG, or damaged.
        TooLarge: more than `max_pixels`.
    """
    try:
        image = _opened(data, max_pixels)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA")
            )
        grey_16 = image.mode.startswith("I")
        plain = image.point(lambda v: v / 256).convert("L") if grey_16 else image
        mode = "L" if encoding.channels == 1 else "RGB"
        if plain.mode != mode:  # a conversion to the same mode would copy
            plain = plain.convert(mode)
        if plain.size != (encoding.width, encoding.height):
            plain = plain.resize((encoding.width, encoding.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(plain, dtype=np.uint8)
    except _UNDECODABLE as error:
        raise _undecodable(data, error) from None
    return pixels.reshape(encoding.height, encoding.width, encoding.channels)


def probe(data: bytes) -> ImageEncoding:
    """The size of a PNG or JPEG file, and whether it has colour, from its header alone.

    Raises:
        Unprocessable: not a PNG or JPEG.
        TooLarge: more than 50 million pixels.
    """
    try:
        image = _opened(data, MAX_PIXELS)
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        return ImageEncoding(height=image.height, width=image.width, channels=1 if grey else 3)
    except _UNDECODABLE as error:
        raise _undecodable(data, error) from None


_UNDECODABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError)


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


def _undecodable(data: bytes, error: Exception) -> Unprocessable:
    return Unprocessable(
        "the image can't be decoded",
        got=f"{len(data)} bytes: {shown(str(error))}",
        allowed=" or ".join(FORMATS),
        fix="check that the whole file was sent",
    )
