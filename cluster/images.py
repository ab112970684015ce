"""The one decoder of image files: training, the gate and serving call it, so they cannot differ.

The file's size in pixels is read from its header and checked before anything is decompressed.
"""

from __future__ import annotations

import io
import warnings

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
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at another limit than ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise TooLarge(
                    "the image has too many pixels",
                    got=f"{image.width} x {image.height}",
                    allowed=f"at most {max_pixels:,} pixels",
                    fix="send a smaller image",
                )
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA")
                )
            grey_16 = image.mode.startswith("I")
            plain = image.point(lambda v: v / 256).convert("L") if grey_16 else image
            plain = plain.convert("L" if encoding.channels == 1 else "RGB")
            if plain.size != (encoding.width, encoding.height):
                plain = plain.resize((encoding.width, encoding.height), Image.Resampling.BILINEAR)
            pixels = np.asarray(plain, dtype=np.uint8)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise Unprocessable(
            "the image can't be decoded",
            got=f"{len(data)} bytes: {shown(str(error))}",
            allowed=" or ".join(FORMATS),
            fix="check that the whole file was sent",
        ) from None
    return pixels.reshape(encoding.height, encoding.width, encoding.channels)
