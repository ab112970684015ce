"""Facts of a dataset that nobody recorded: every row is read once, images by their header only.

Row groups are summarised in parallel and merged in their order (`training.data.statistics`), so the
facts are the same to the last bit however many threads took part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from training.data.numbering import RowGroup
from training.data.statistics import Summaries, check_label, merged, new_summaries, summarised
from training.facts import ColumnFacts

_SCAN_THREADS = 4


def scanned(
    schema: pa.Schema,
    row_groups: Sequence[RowGroup],
    read: Callable[[int, list[str]], pa.Table],
    label: str,
) -> dict[str, ColumnFacts]:
    """What each column holds.

    Args:
        read: gives the table of some columns of row group number so-and-so.

    Raises:
        BadInput: a column that no task can use, or a label that can't be learnt from.
        StorageError: as `read`.
    """

    def part(index: int) -> Summaries:
        return summarised(read(index, schema.names), label, row_groups[index].first_row)

    summaries = new_summaries(schema, label)
    with ThreadPoolExecutor(_SCAN_THREADS, "tandem-scan") as pool:
        try:
            # Each thread gives back a few numbers, so only as many tables as threads are alive.
            for found in pool.map(part, range(len(row_groups))):
                summaries = merged(summaries, found)
        finally:
            pool.shutdown(cancel_futures=True)
    columns = {name: summary.facts(name) for name, summary in summaries.items()}
    check_label(label, columns[label])
    return columns
