"""Images: what they look like once decoded, what damaged ones answer, and that large ones take turns."""

import base64
import io
import threading

import numpy as np
import pytest
from PIL import Image

from cluster import images
from cluster.errors import TooLarge, Unprocessable
from cluster.signature import ImageEncoding

TORN_PROFILE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAADElEQVR4nGNgoA4AAABIAAEuuDx+AAAABGlDQ1BhYmMA6KMLWAAAAABJ"
    "RU5ErkJggg=="
)
SMALL = ImageEncoding(height=8, width=12, channels=3)
GREY = ImageEncoding(height=8, width=12, channels=1)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def test_a_chunk_that_pillow_stumbles_over_is_refused() -> None:
    with pytest.raises(Unprocessable, match="can't be decoded"):
        images.decode(TORN_PROFILE, SMALL)


@pytest.mark.parametrize("data", [b"", b"text", TORN_PROFILE[:20]])
def test_what_is_not_an_image_is_refused_without_an_address(data: bytes) -> None:
    for read in (images.probe, lambda data: images.decode(data, SMALL)):
        with pytest.raises(Unprocessable) as caught:
            read(data)
        assert "0x" not in str(caught.value)
        assert "_io" not in str(caught.value)


@pytest.mark.parametrize("encoding", [SMALL, GREY])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_black(mode: str, encoding: ImageEncoding) -> None:
    image = Image.fromarray(noise(40, 60, 4), "RGBA").convert(mode)
    laid = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    wanted = laid.convert("L" if encoding.channels == 1 else "RGB").resize((12, 8), Image.Resampling.BILINEAR)
    got = images.decode(file_of(image), encoding)
    assert np.abs(got.astype(int) - np.asarray(wanted, int).reshape(got.shape)).max() <= 2


def test_a_transparent_colour_is_black() -> None:
    for image, colour in (
        (Image.new("RGB", (5, 5), (9, 200, 9)), (9, 200, 9)),
        (Image.new("L", (5, 5), 7), 7),
    ):
        assert not images.decode(file_of(image, transparency=colour), SMALL).any()
    palette = Image.new("P", (5, 5), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert not images.decode(file_of(palette, transparency=b"\xff\x00"), SMALL).any()
    assert images.decode(file_of(palette), SMALL)[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16"])
def test_every_mode_gives_the_channels_asked_for(mode: str) -> None:
    grey_16 = Image.fromarray(np.full((8, 12), 200 * 256, np.uint16))
    image = grey_16 if mode == "I;16" else Image.new("L", (12, 8), 255).convert(mode)
    data = file_of(image, "JPEG" if mode == "CMYK" else "PNG")
    assert images.decode(data, SMALL).shape == (8, 12, 3)
    assert images.decode(data, GREY).min() >= 199


def test_a_large_jpeg_is_reduced_while_it_is_decompressed() -> None:
    ramp = np.linspace(0, 255, 3000, dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.tile(ramp, (1500, 1))[:, :, None], 3, axis=2))
    wanted = np.asarray(image.resize((12, 8), Image.Resampling.BILINEAR), int)
    for progressive in (False, True):
        got = images.decode(file_of(image, "JPEG", progressive=progressive), SMALL)
        assert np.abs(got.astype(int) - wanted).max() <= 3


def test_only_one_large_image_is_decompressed_at_a_time() -> None:
    large = file_of(Image.new("RGBA", (2001, 2000), (1, 2, 3, 255)))
    small = file_of(Image.new("RGBA", (20, 20), (1, 2, 3, 255)))
    done = threading.Event()

    def decode_large() -> None:
        images.decode(large, SMALL)
        done.set()

    thread = threading.Thread(target=decode_large)
    with images._one_large_at_a_time:
        thread.start()
        assert images.decode(small, SMALL)[0, 0].tolist() == [1, 2, 3]
        assert not done.wait(0.3)
    thread.join(30)
    assert done.is_set()
    with pytest.raises(TooLarge):
        images.decode(large, SMALL, max_pixels=1000)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_short_way_and_pillows_reader_give_the_same(channels: int) -> None:
    encoding = ImageEncoding(height=9, width=14, channels=channels)
    rng = np.random.default_rng(channels)
    mode = "L" if channels == 1 else "RGB"
    smooth = np.cumsum(rng.integers(0, 3, (9, 14, channels), np.uint8), axis=1, dtype=np.uint8)
    whole = file_of(Image.fromarray(smooth.squeeze()))
    taken = images._plain_png(whole, mode, encoding)
    assert taken is not None
    np.testing.assert_array_equal(taken, smooth)
    damaged = [whole[:end] for end in range(len(whole))]  # left to Pillow, like a flipped bit
    for place in range(len(whole)):
        other = bytearray(whole)
        other[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(other))
    assert all(images._plain_png(data, mode, encoding) is None for data in damaged)


@pytest.mark.parametrize("options", [{"dpi": (72, 72)}, {"optimize": True}, {"compress_level": 0}])
def test_other_writers_files_decode_alike(options: dict) -> None:
    pixels = noise(8, 12, 3)
    np.testing.assert_array_equal(images.decode(file_of(Image.fromarray(pixels), **options), SMALL), pixels)


def test_a_picture_of_many_idat_chunks_decodes_whole() -> None:
    pixels = noise(200, 300, 3)
    encoding = ImageEncoding(height=200, width=300, channels=3)
    data = file_of(Image.fromarray(pixels))
    assert data.count(b"IDAT") > 1
    np.testing.assert_array_equal(images.decode(data, encoding), pixels)
