"""Readers to be compared: each makes torch tensors of the same columns out of the same Parquet.

    python -m tests.bench.readers NAME '{"data": URI, "batch": ROWS, "images": BOOL, …}'

A reader is a process of its own, so that none meets another's threads. It reads one epoch to warm
up, says `ready`, and then, for each line on its stdin, reads whole epochs, the start of each included,
until a second is over, and answers with rows a second. What each one does:

    tandem             the plan's shuffle: groups, then rows within a window of 64 MiB; in order for every
                       world size, and any position can be sought
    tandem-in-order    the same, with the shuffle switched off
    ray                Ray Data's `iter_torch_batches`, no shuffle; images decoded in `map_batches`
    ray-shuffled       the same with `local_shuffle_buffer_size` of 16 batches (a far smaller window)
    loader-shuffled    DataLoader(shuffle=True) on a map-style dataset that holds all columns in memory
                       and takes a batch's rows at once (`__getitems__`): reading isn't part of it
    loader-streaming   DataLoader on an iterable dataset: row groups in turn, no shuffle

A DataLoader is tried with 0 and 2 workers while it warms up, and keeps what is fastest.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from cluster import images
from cluster.signature import ImageEncoding
from cluster.storage import arrow_filesystem

Tensors = dict[str, torch.Tensor]
Epoch = Callable[[], Iterable[Tensors]]
WORKERS_TRIED = (2, 0)
"""Two first: processes are forked before Arrow's threads are busy."""
TRIED_FOR_S = 1.0
ROUND_AT_LEAST_S = 1.0
RAY_SHUFFLE_BATCHES = 16


class Work:
    """What all readers are asked for."""

    def __init__(
        self, data: str, batch: int, images: bool = False, side: int = 0, channels: int = 1, **more: Any
    ) -> None:
        self.data = data
        self.batch = batch
        self.images = images
        self.encoding = ImageEncoding(height=side or 1, width=side or 1, channels=channels)
        self.more = more

    def decoded(self, files: Iterable[bytes]) -> np.ndarray:
        """What every reader calls to make pixels of files: uint8 [B, H, W, C]."""
        return np.stack([images.decode(data, self.encoding) for data in files])

    def tensors(self, table: pa.Table) -> Tensors:
        """A table's columns as tensors that own their memory."""
        found = {}
        for name in table.column_names:
            column = table.column(name)
            if self.images and name == "image":
                found[name] = torch.from_numpy(self.decoded(column.to_pylist()))
            else:
                found[name] = torch.from_numpy(np.array(column.to_numpy()))
        return found

    def files(self) -> tuple[Any, list[str]]:
        """The file system and the paths of the files."""
        from pyarrow import fs

        filesystem, root = arrow_filesystem(self.data)
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        return filesystem, sorted(info.path for info in found if info.path.endswith(".parquet"))


def tandem(work: Work, shuffle: bool = True) -> Epoch:
    from training.data.dataset import Dataset
    from training.data.loader import Loader
    from training.tasks import build_task

    # Nothing that was read is kept in memory: neither is it by the peers that read.
    dataset = Dataset.open(work.data, cache_bytes=0, **work.more)
    task = build_task(
        "image-classification" if work.images else "tabular-classification", dataset.facts("label"), {}
    )
    plan = dataset.plan(0, shuffle=shuffle)
    options = {"global_batch_size": work.batch, "rank": 0, "world_size": 1, "epochs": 10**6}
    state = {"cursor": 0, "batches": None}

    def epoch() -> Iterator[Tensors]:
        # One loader for all epochs, as in training.
        state["batches"] = state["batches"] or Loader(dataset, plan, task, cursor=0, **options).__enter__()
        state["cursor"] += dataset.rows
        for batch in state["batches"]:
            yield {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
            if batch.next_cursor == state["cursor"]:
                return

    return epoch


def ray(work: Work, shuffle: bool = False) -> Epoch:
    import ray as ray_
    import ray.data

    ray_.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray_.data.DataContext.get_current()
    context.enable_progress_bars = False
    filesystem, paths = work.files()
    data = ray_.data.read_parquet(paths, filesystem=filesystem)
    if work.images:

        def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {**batch, "image": work.decoded(batch["image"])}

        data = data.map_batches(decode, batch_size=work.batch)
    buffer = work.batch * RAY_SHUFFLE_BATCHES if shuffle else None
    return lambda: data.iter_torch_batches(batch_size=work.batch, local_shuffle_buffer_size=buffer)


class InMemory(TorchDataset[Tensors]):
    """Map-style; a batch's rows are taken at once."""

    def __init__(self, work: Work) -> None:
        filesystem, paths = work.files()
        self._work = work
        self._table = pa.concat_tables(
            [pq.read_table(path, filesystem=filesystem) for path in paths]
        ).combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitems__(self, rows: list[int]) -> Tensors:
        return self._work.tensors(self._table.take(pa.array(rows)))


class Streaming(IterableDataset[Tensors]):
    """Row groups in turn, shared out among the workers, cut into batches; a group's rest carries over."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._filesystem, self._paths = work.files()

    def __iter__(self) -> Iterator[Tensors]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        left: pa.Table | None = None
        for n, (path, group) in enumerate(self._groups()):
            if n % count != number:
                continue
            table = pq.ParquetFile(path, filesystem=self._filesystem, pre_buffer=True).read_row_group(group)
            left = table if left is None else pa.concat_tables([left, table]).combine_chunks()
            whole = left.num_rows // self._work.batch * self._work.batch
            for start in range(0, whole, self._work.batch):
                yield self._work.tensors(left.slice(start, self._work.batch))
            left = left.slice(whole)
        if left is not None and left.num_rows:
            yield self._work.tensors(left)

    def _groups(self) -> Iterator[tuple[str, int]]:
        for path in self._paths:
            for group in range(pq.ParquetFile(path, filesystem=self._filesystem).num_row_groups):
                yield path, group


def _as_it_is(batch: Tensors) -> Tensors:
    return batch


def loader(work: Work, shuffle: bool) -> Epoch:
    data: Any = InMemory(work) if shuffle else Streaming(work)

    def made(workers: int) -> DataLoader[Tensors]:
        options: dict[str, Any] = {"num_workers": workers}
        if workers:
            # Arrow's S3 client doesn't survive a fork.
            how = "spawn" if work.data.startswith("s3:") else "fork"
            options |= {"persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": how}
        if shuffle:
            options |= {"batch_size": work.batch, "shuffle": True, "collate_fn": _as_it_is}
        else:
            options |= {"batch_size": None}
        return DataLoader(data, **options)

    def speed(candidate: DataLoader[Tensors]) -> float:
        rows, started_s, until_s = 0, 0.0, 0.0
        for batch in candidate:
            if not started_s:  # workers have started
                started_s = time.monotonic()
                until_s = started_s + TRIED_FOR_S
                continue
            rows += len(batch["label"])
            if time.monotonic() > until_s:
                break
        return rows / (time.monotonic() - started_s)

    candidates = [made(workers) for workers in WORKERS_TRIED]
    best = max(candidates, key=speed)
    return lambda: best


READERS: dict[str, Callable[[Work], Epoch]] = {
    "tandem": tandem,
    "tandem-in-order": lambda work: tandem(work, shuffle=False),
    "ray": ray,
    "ray-shuffled": lambda work: ray(work, shuffle=True),
    "loader-shuffled": lambda work: loader(work, shuffle=True),
    "loader-streaming": lambda work: loader(work, shuffle=False),
}


def _read(epoch: Epoch) -> int:
    return sum(len(batch["__target__" if "__target__" in batch else "label"]) for batch in epoch())


def _say(**facts: float) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    name, asked = sys.argv[1], json.loads(sys.argv[2])
    epoch = READERS[name](Work(**asked))
    rows = _read(epoch)
    _say(ready=rows)
    for _ in sys.stdin:
        started_s = time.monotonic()
        read, epochs = 0, 0
        while time.monotonic() < started_s + ROUND_AT_LEAST_S:
            read += _read(epoch)
            epochs += 1
        assert read == rows * epochs, (read, rows)
        _say(rows_per_s=read / (time.monotonic() - started_s))


if __name__ == "__main__":
    main()
