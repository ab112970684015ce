"""A folder of Parquet files as one numbered sequence of rows.

How rows are numbered is said in `training.data.numbering`. Opening reads the footers only. The
fingerprint covers each file's path, size and footer (which holds rows, row groups, schema, offsets and
the statistics of every column), so it changes when a file is added, removed or rewritten; it is not a
hash of every byte.

Columns come as `training.data.parquet` says: strings and bytes as their `large_` types.
Knows nothing of batches, tasks or workers.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from cluster.errors import BadInput, StorageError
from cluster.storage import Location, arrow_filesystem
from training.data.cache import RowGroupCache
from training.data.footers import DataFile, find_files, read_footers
from training.data.numbering import Numbering, RowGroup, row_groups_of
from training.data.parquet import open_file, read_group
from training.data.patience import IMPATIENT, Patience
from training.data.plan import Plan
from training.data.record import read_record
from training.data.scan import scanned
from training.data.table_cache import TableCache
from training.facts import DatasetFacts

CACHE_BYTES = 64 * 1024 * 1024
WINDOW_BYTES = 64 * 1024 * 1024
_MAX_OPEN_FILES = 64


class Dataset:
    """Parquet files as one sequence of rows, numbered from 0. Safe to use from several threads.

    Made by `Dataset.open`. `schema` is a pyarrow.Schema: what the reading methods give.
    """

    def __init__(
        self,
        uri: str,
        filesystem: fs.FileSystem,
        root: str,
        files: list[DataFile],
        *,
        cache_bytes: int,
        disk: RowGroupCache | None,
        patience: Patience,
    ) -> None:
        self.uri = uri
        self.files = tuple(file.name for file in files)
        self.schema: Any = files[0].schema
        self.is_remote = not isinstance(filesystem, fs.LocalFileSystem)
        self.row_groups = row_groups_of(files)
        self.rows = sum(group.rows for group in self.row_groups)
        self.fingerprint = _fingerprint(files)
        self._filesystem = filesystem
        self._root = root
        self._files = files
        self._numbering = Numbering(self.row_groups)
        self._lock = threading.Lock()
        self._sources: OrderedDict[int, pa.NativeFile] = OrderedDict()
        self._cache = TableCache(cache_bytes)
        self._disk = disk
        self._patience = patience

    def __repr__(self) -> str:
        return f"Dataset({self.uri!r}, {self.rows} rows, {len(self.row_groups)} row groups)"

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        cache_bytes: int = CACHE_BYTES,
        disk_bytes: int = 0,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> Dataset:
        """Read the footers of every file below `uri`, or of the one file that it names.

        Args:
            cache_bytes: how much of what was read last is kept in memory.
            disk_bytes: how much this machine's disk may keep of remote datasets, this one and others
                (training.data.cache); none of a local one is kept.
            patience: with a remote store that fails; a local one is not asked again.

        Raises:
            BadInput: no files, no rows, columns that differ, or a column of a type that isn't taken.
            NotFound: there is nothing at `uri`.
            StorageError: the store can't be read.
        """
        canonical = Location.parse(uri).uri
        filesystem, root = arrow_filesystem(canonical)
        disk = None
        if Location.parse(canonical).scheme == "file":
            patience = IMPATIENT
        elif disk_bytes:
            disk = RowGroupCache.open(disk_bytes)
        found = patience.read(lambda: find_files(filesystem, root, canonical))
        files = read_footers(filesystem, found, patience)
        dataset = cls(
            canonical, filesystem, root, files, cache_bytes=cache_bytes, disk=disk, patience=patience
        )
        if not dataset.rows:
            raise BadInput(
                "the dataset has no rows",
                got=f"{canonical} with {len(files)} empty files",
                allowed="at least one row",
                fix="check what wrote the files",
            )
        return dataset

    def check_unchanged(self, fingerprint: str) -> None:
        """Refuse to go on if this isn't the dataset that had `fingerprint`.

        Raises:
            BadInput: the files were changed.
        """
        if fingerprint != self.fingerprint:
            raise BadInput(
                f"the data in {self.uri} changed since the run was started",
                got=f"fingerprint {self.fingerprint[:16]}…",
                allowed=f"fingerprint {fingerprint[:16]}…",
                fix="restore the files, or start a new run on the new data",
            )

    def read_group(
        self, index: int, columns: list[str], *, given_up: threading.Event | None = None
    ) -> pa.Table:
        """The whole of `row_groups[index]`: a table of `columns`, in that order.

        Args:
            given_up: set when nobody waits for it any more, so that a store that fails isn't asked again.

        Raises:
            BadInput: no such column.
            StorageError: the file can't be read; `Damaged` if it is not what it was.
        """
        key = (index, tuple(columns))
        table = self._cache.get(key)
        if table is None:
            self._check_columns(columns)
            table = self._read(self.row_groups[index], columns, given_up)
            self._cache.put(key, table)
        return table

    def _read(self, group: RowGroup, columns: list[str], given_up: threading.Event | None) -> pa.Table:
        file = self._files[group.file]
        kept_as = f"{self.uri} {file.name!r} {file.size_bytes} {file.digest} {group.group} {columns!r}"
        table = self._disk.get(kept_as) if self._disk else None
        if table is None:
            table = self._patience.read(lambda: self._fetched(group, columns), given_up)
            if self._disk:
                self._disk.put(kept_as, table)
        return table

    def _fetched(self, group: RowGroup, columns: list[str]) -> pa.Table:
        try:
            return read_group(self._source(group.file), self._files[group.file], group.group, columns)
        except StorageError:
            # Opened anew the next time: that says why more plainly than a read of a few bytes does.
            with self._lock:
                self._sources.pop(group.file, None)
            raise

    def read_rows(
        self, row_ids: NDArray[np.int64], columns: list[str], *, pool: Executor | None = None
    ) -> pa.Table:
        """The given rows in the given order, one chunk a column; an id may come more than once.

        Args:
            row_ids: int64 [n], each at least 0 and less than `rows`.
            pool: reads row groups in parallel; without it they are read here, one after another.

        Raises:
            as `read_group`.
        """
        assert len(row_ids) == 0 or (row_ids.min() >= 0 and row_ids.max() < self.rows), "row out of range"
        # Ascending rows, as evaluation asks for, need not be put back in order.
        ascending = bool((np.diff(row_ids) > 0).all())

        def part(job: tuple[int, NDArray[np.int64]]) -> pa.Table:
            index, places = job
            table = self.read_group(index, columns)
            if ascending and len(places) == table.num_rows:
                return table
            return table.take(pa.array(row_ids[places] - self._numbering.first_rows[index]))

        jobs = self._numbering.by_group(row_ids)
        if not jobs:
            return self.empty(columns)
        joined = pa.concat_tables(pool.map(part, jobs) if pool else map(part, jobs)).combine_chunks()
        if ascending:
            return joined
        by_group = np.concatenate([places for _, places in jobs])
        back = np.empty_like(by_group)
        back[by_group] = np.arange(len(by_group))
        return joined.take(pa.array(back))

    def group_of(self, row_id: int) -> int:
        """The index in `row_groups` of the one that holds a row."""
        return self._numbering.group_of(row_id)

    @property
    def mean_row_bytes(self) -> float:
        """Of all columns, before compression."""
        return sum(group.size_bytes for group in self.row_groups) / self.rows

    def place_of(self, row_id: int) -> str:
        """Where one finds a row, in words."""
        group = self.row_groups[self.group_of(row_id)]
        file = self.files[group.file]
        return f"row {row_id - group.first_row} of row group {group.group} of '{file}' in {self.uri}"

    def empty(self, columns: list[str]) -> pa.Table:
        """A table of `columns` without rows.

        Raises:
            BadInput: no such column.
        """
        self._check_columns(columns)
        return pa.schema([self.schema.field(name) for name in columns]).empty_table()

    def facts(self, label: str) -> DatasetFacts:
        """What training needs to know of the columns, `label` being the one to predict.

        Taken from the record that `tandem data import` leaves, if it is of this very dataset and
        label; otherwise every row is read once, images by their header only.

        Raises:
            BadInput: no such label, or a column that no task can use; says which and what to do.
            StorageError: the store can't be read.
        """
        if label not in self.schema.names:
            raise BadInput(
                "the dataset has no such label column",
                got=f"'{label}'",
                allowed="one of " + ", ".join(self.schema.names),
                fix="set `data.label` in the recipe",
            )
        stored = read_record(self._filesystem, self._root)
        if stored and (stored.facts.fingerprint, stored.facts.label) == (self.fingerprint, label):
            return stored.facts
        columns = scanned(self.schema, self.row_groups, self.read_group, label)
        return DatasetFacts(fingerprint=self.fingerprint, rows=self.rows, columns=columns, label=label)

    def plan(self, seed: int, *, shuffle: bool = True) -> Plan:
        """The order of this dataset's samples.

        The shuffle window is as many average row groups as fit 64 MiB before compression, at least 2:
        a function of the dataset alone, like the order itself.
        """
        total_bytes = sum(group.size_bytes for group in self.row_groups)
        window_groups = WINDOW_BYTES * len(self.row_groups) // max(1, total_bytes)
        rows = tuple(group.rows for group in self.row_groups)
        return Plan(seed, self.fingerprint, rows, max(2, min(len(rows), window_groups)), shuffle)

    def _source(self, file: int) -> pa.NativeFile:
        with self._lock:
            if file in self._sources:
                self._sources.move_to_end(file)
                return self._sources[file]
        source = open_file(self._filesystem, self._files[file])
        with self._lock:
            self._sources[file] = source
            # Dropped, not closed: another thread may still be reading from it.
            while len(self._sources) > _MAX_OPEN_FILES:
                self._sources.popitem(last=False)
        return source

    def _check_columns(self, columns: list[str]) -> None:
        for name in columns:
            if name not in self.schema.names:
                raise BadInput(
                    f"the dataset {self.uri} has no column '{name}'",
                    got="columns " + ", ".join(self.schema.names),
                    allowed="every column that the model was made for",
                    fix=f"add '{name}' to the dataset, or use one that has it",
                )


def _fingerprint(files: list[DataFile]) -> str:
    digest = hashlib.sha256(b"tandem dataset 1\n")
    for file in files:
        digest.update(f"{file.name!r} {file.size_bytes} {file.digest}\n".encode())
    return digest.hexdigest()
