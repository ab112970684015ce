"""Decodes the images of batches, some images a job, in threads or in processes: a choice for a whole run.

Many small images are decoded by processes (`training.data.decoding`), few small ones where they are asked
for, larger ones in threads, which Pillow lets run side by side. The choice has no say in the pixels.

Knows nothing of windows or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.converter import Converter
from training.data.decoding import Decoders, decode_here
from training.data.pictures import IMAGES_PER_JOB, SMALL_IMAGE_BYTES, images_begun
from training.task import Arrays

_MOST_DECODERS = 4
_DECODERS_PAY_FROM_ROWS = 20_000
"""A process takes as long to start as it does to decode some thousands of small images."""
_SMALL_IMAGES_PER_JOB = 64


class Pixels:
    """Decodes what a converter leaves undecoded. Close it.

    Args:
        mean_row_bytes: of the dataset.
        rows: how many this worker will use; few of them aren't worth a process.
        threads: how many jobs are done at once.
    """

    def __init__(self, converter: Converter, mean_row_bytes: float, rows: int, threads: int) -> None:
        self._converter = converter
        small = mean_row_bytes < SMALL_IMAGE_BYTES
        processes = 0
        if converter.images and small and rows >= _DECODERS_PAY_FROM_ROWS:
            processes = min(threads, _MOST_DECODERS)
        self.processes = Decoders(processes) if processes else None
        self.pool = ThreadPoolExecutor(processes or threads, "tandem-decode")
        self._decode = decode_here if self.processes is None else self.processes.decode
        self._images_per_job = IMAGES_PER_JOB if self.processes is None else _SMALL_IMAGES_PER_JOB
        if self.processes is None and small:
            self._images_per_job = max(1, rows)

    def begun(self, files: pa.Table, row_ids: NDArray[np.int64]) -> tuple[Arrays, list[Future[None]]]:
        """The images in the columns of `files`, and the jobs that fill them in; see `finished`.

        Args:
            row_ids: int64 [rows of `files`], their numbers in the dataset.
        """
        arrays: Arrays = {}
        jobs: list[Future[None]] = []
        for tensor in self._converter.images:
            arrays[tensor.name], begun = images_begun(
                files,
                tensor,
                self.pool,
                decode=self._decode,
                images_per_job=self._images_per_job,
                row_ids=row_ids,
            )
            jobs += begun
        return arrays, jobs

    def finished(self, jobs: Sequence[Future[None]]) -> None:
        """Wait for jobs.

        Raises:
            BadInput: a row that can't be used; names dataset, file, row group and row.
        """
        with self._converter.placing_errors():
            for job in jobs:
                job.result()

    def stop(self) -> None:
        """Begin nothing more; who waits gets an error. May be called twice."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait until the threads and processes have ended. May be called twice."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.processes is not None:
            self.processes.close()
