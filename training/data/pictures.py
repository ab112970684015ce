"""Columns of image files to pixels, in one go or as jobs; the row of a file that can't be decoded is named.

Knows nothing of where decoding is done (`training.data.decoding`) or which images make a batch.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import BadInput
from cluster.signature import Tensor
from training.data.decoder import BadImage
from training.data.decoding import Decode, decode_here
from training.data.rows import BadRow, RowIds, column_of, holds_bytes, row_number

IMAGES_PER_JOB = 32
SMALL_IMAGE_BYTES = 8 * 1024
"""Below this mean size of file, threads lose more by handing the interpreter around than they gain."""


def images_begun(
    table: pa.Table,
    tensor: Tensor,
    pool: Executor,
    *,
    decode: Decode = decode_here,
    images_per_job: int = IMAGES_PER_JOB,
    row_ids: RowIds | None = None,
) -> tuple[NDArray[np.uint8], list[Future[None]]]:
    """An image tensor that is being filled, uint8 [B, H, W, C], and the jobs that fill it.

    A job raises what `input_arrays` does; the pixels are there when every job is done.
    """
    column, pixels = _image_column(table, tensor)
    starts = range(0, len(pixels), images_per_job)
    return pixels, [
        pool.submit(_decode_part, column, tensor, pixels, start, start + images_per_job, decode, row_ids)
        for start in starts
    ]


def decoded_images(
    table: pa.Table, tensor: Tensor, pool: Executor | None, row_ids: RowIds | None
) -> NDArray[np.uint8]:
    """An image tensor, uint8 [B, H, W, C]; small files are decoded here, larger ones by the pool."""
    if pool is not None and table.column(tensor.name).nbytes >= SMALL_IMAGE_BYTES * table.num_rows:
        pixels, jobs = images_begun(table, tensor, pool, row_ids=row_ids)
        for job in jobs:
            job.result()
        return pixels
    column, pixels = _image_column(table, tensor)
    _decode_part(column, tensor, pixels, 0, len(pixels), decode_here, row_ids)
    return pixels


def _image_column(table: pa.Table, tensor: Tensor) -> tuple[pa.ChunkedArray, NDArray[np.uint8]]:
    """The files, and room for their pixels."""
    column = column_of(table, tensor.name)
    if not holds_bytes(column.type):
        raise BadInput(
            f"column '{tensor.name}' doesn't hold images",
            got=str(column.type),
            allowed="bytes: whole PNG or JPEG files",
            fix="make the dataset with `tandem data import images`",
        )
    encoding = tensor.encoding
    assert encoding is not None, "the tensor is no image"
    shape = (len(column), encoding.height, encoding.width, encoding.channels)
    return column.cast(pa.large_binary()), np.empty(shape, np.uint8)


def _decode_part(
    column: pa.ChunkedArray,
    tensor: Tensor,
    pixels: NDArray[np.uint8],
    start: int,
    stop: int,
    decode: Decode,
    row_ids: RowIds | None,
) -> None:
    assert tensor.encoding is not None
    try:
        decode(column.slice(start, stop - start), tensor.encoding, pixels[start:stop])
    except BadImage as error:
        row = row_number(start + error.place, row_ids)
        raise BadRow(
            f"row {row} of '{tensor.name}': {error.failed}",
            row,
            got=error.got,
            allowed=error.allowed,
            fix="remove the row, or write the image anew",
        ) from None
