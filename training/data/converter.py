"""What one task takes of one dataset: which columns, and as which arrays.

Whatever a row has wrong with it is told by dataset, file, row group and row.

Knows nothing of windows, batches or workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import BadInput
from training.data.columns import model_input, target_array
from training.data.dataset import Dataset
from training.data.rows import BadRow
from training.problem import TARGET, Arrays, Problem


class Converter:
    """Converts tables of a dataset for a task; images are left as files.

    `columns` are the names of all columns to be read, the label last; `images` the tensors that are
    images.
    """

    def __init__(self, dataset: Dataset, task: Problem) -> None:
        inputs = task.signature().inputs
        self.images = [tensor for tensor in inputs if tensor.encoding is not None]
        self.columns = list(dict.fromkeys([*(tensor.name for tensor in inputs), task.facts.label]))
        self._dataset = dataset
        self._facts = task.facts
        self._plain = [tensor for tensor in inputs if tensor.encoding is None]
        self._vocabularies = task.vocabularies()

    def plain(self, table: pa.Table, row_ids: NDArray[np.int64]) -> Arrays:
        """All but the images, as the model takes them; not to be written to.

        Args:
            row_ids: int64 [rows of the table], their numbers in the dataset.

        Raises:
            BadInput: a row that can't be used; names dataset, file, row group and row.
        """
        with self.placing_errors():
            arrays: Arrays = {
                tensor.name: model_input(table, tensor, self._vocabularies.get(tensor.name), row_ids=row_ids)
                for tensor in self._plain
            }
            return arrays | {TARGET: target_array(table, self._facts, row_ids=row_ids)}

    def room(self, rows: int) -> Arrays:
        """Arrays such as `plain` gives, of so many rows, not filled."""
        like = self.plain(self._dataset.empty(self.columns), np.empty(0, np.int64))
        return {name: np.empty((rows, *a.shape[1:]), a.dtype) for name, a in like.items()}

    @contextlib.contextmanager
    def placing_errors(self) -> Iterator[None]:
        """What is wrong with a row within this, told by where one finds the row."""
        try:
            yield
        except BadRow as error:
            raise BadInput(
                f"{error.failed} ({self._dataset.place_of(error.row)})",
                got=error.got,
                allowed=error.allowed,
                fix=error.fix,
            ) from None
