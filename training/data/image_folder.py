"""A folder of folders of images to tables: each file as it is, the name of its folder as its label.

Every image is decoded once, so that a broken one is named before it is in the middle of a training run.

Knows nothing of datasets, of which rows are held out, or of Parquet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from cluster import images
from cluster.errors import BadInput, NotFound, TandemError, shown
from training.data.publish import GROUP_BYTES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_IMAGE_GROUP_ROWS = 1024
_FILES_AT_ONCE = 64


def image_files(folder: Path) -> tuple[list[Path], int]:
    """The images, sorted, and how many other files there are.

    Raises:
        NotFound: no such folder.
        BadInput: fewer than two classes.
    """
    if not folder.is_dir():
        raise NotFound(
            "there is no such folder", got=str(folder), allowed="a folder of folders", fix="check the path"
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    taken = [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES and len(path.relative_to(folder).parts) > 1
    ]
    classes = Counter(path.relative_to(folder).parts[0] for path in taken)
    if len(classes) < 2:
        raise BadInput(
            f"'{folder}' doesn't hold at least two classes of images",
            got=f"{len(files)} files; classes {shown(sorted(classes))}",
            allowed="FOLDER/CLASS/NAME.png, .jpg or .jpeg",
            fix="put the images of each class into a folder of its own, called by the class's name",
        )
    return taken, len(files) - len(taken)


def image_tables(files: list[Path], classes: list[str], pool: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """Tables of up to 1,024 rows or about 8 MiB, in the files' order: columns `image` and `label`.

    Raises:
        BadInput: a file that can't be read or decoded; names it.
    """
    contents: list[bytes] = []
    written = held_bytes = 0
    for start in range(0, len(files), _FILES_AT_ONCE):
        for data in pool.map(_checked_image, files[start : start + _FILES_AT_ONCE]):
            contents.append(data)
            held_bytes += len(data)
            done = written + len(contents)
            if len(contents) == _IMAGE_GROUP_ROWS or held_bytes >= GROUP_BYTES or done == len(files):
                labels = classes[written:done]
                yield pa.table({"image": pa.array(contents, pa.binary()), "label": labels})
                contents, held_bytes, written = [], 0, done


def _checked_image(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        images.decode(data, images.probe(data))
        return data
    except TandemError as error:
        raise BadInput(
            f"'{path}': {error.failed}",
            got=error.got,
            allowed=error.allowed,
            fix="remove the file, or write it anew",
        ) from None
    except OSError as error:
        raise BadInput(
            f"'{path}' can't be read",
            got=shown(str(error)),
            allowed="a file that you may read",
            fix="check its rights",
        ) from None
