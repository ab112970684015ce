"""Writes a training and an evaluation dataset to a store, all or nothing.

    DESTINATION/_import.json                 the claim: created first, removed at the end
    DESTINATION/{train,eval}/part-00000.parquet …
    DESTINATION/eval/_tandem.json            schema and statistics
    DESTINATION/train/_tandem.json           the same, and the commit: last, put-if-absent

Files are written to a temporary directory and uploaded by the store's client, never by pyarrow,
which publishes half an object when it is interrupted.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import Conflict
from cluster.storage import Location, Store, open_store
from training.data.dataset import Dataset
from training.data.record import RECORD_NAME, Record

SPLITS = ("train", "eval")
GROUP_ROWS = 65_536
GROUP_BYTES = 8 * 1024 * 1024
_FILE_BYTES = 128 * 1024 * 1024
_CLAIM = "_import.json"
_PARALLEL_UPLOADS = 4


@dataclass(frozen=True)
class Published:
    """What was written. Both mappings are keyed by 'train' and 'eval'."""

    uris: Mapping[str, str]
    records: Mapping[str, Record]
    files: int
    size_bytes: int


def published(destination: str) -> dict[str, str] | None:
    """The URIs of the datasets that were published at `destination`, if they were."""
    committed = open_store(destination).size_bytes(f"train/{RECORD_NAME}") is not None
    return _uris(destination) if committed else None


def check_free(destination: str) -> None:
    """Refuse a destination that holds a dataset already.

    Raises:
        Conflict: it does, or another import has begun there.
        StorageError: the store can't be read.
    """
    store = open_store(destination)
    for split in SPLITS:
        if keys := store.keys(split):
            raise Conflict(
                "the destination holds data already",
                got=f"{len(keys)} files in {store.uri}/{split}, such as '{keys[0]}'",
                allowed="a destination without `train` and `eval`",
                fix="choose another destination, or delete those two folders first",
            )
    if store.size_bytes(_CLAIM) is not None:
        raise _claimed(store)


def publish(splits: Mapping[str, Iterable[pa.Table]], destination: str, *, label: str) -> Published:
    """Write tables as the datasets `train` and `eval` below `destination`.

    Args:
        splits: for 'train' and for 'eval', tables of one schema; each begins a row group.

    Raises:
        Conflict: the destination holds data, or another import is writing there.
        BadInput: columns that no task can use.
        StorageError: the store can't be written. What was uploaded is then removed again.
    """
    check_free(destination)
    store = open_store(destination)
    if not store.put_if_absent(_CLAIM, secrets.token_hex(16).encode()):
        raise _claimed(store)
    try:
        return _publish(splits, store, destination, label)
    finally:
        if published(destination) is None:
            store.delete([key for split in SPLITS for key in store.keys(split)])
        store.delete([_CLAIM])


def publish_again(splits: Mapping[str, Iterable[pa.Table]], destination: str, *, label: str) -> Published:
    """As `publish`, over whatever an earlier attempt of the same bytes may have left."""
    return _publish(splits, open_store(destination), destination, label)


def _publish(
    splits: Mapping[str, Iterable[pa.Table]], store: Store, destination: str, label: str
) -> Published:
    with tempfile.TemporaryDirectory(prefix="tandem-import-") as folder:
        records = {}
        for split in SPLITS:
            directory = Path(folder, split)
            directory.mkdir()
            _write_files(splits[split], directory)
            dataset = Dataset.open(str(directory))
            types = {field.name: str(field.type) for field in dataset.schema}
            records[split] = Record(types=types, facts=dataset.facts(label))
        paths = sorted(Path(folder).rglob("*.parquet"))
        size_bytes = sum(path.stat().st_size for path in paths)
        with ThreadPoolExecutor(_PARALLEL_UPLOADS, "tandem-upload") as pool:
            uploads = [pool.submit(store.put, str(path.relative_to(folder)), path) for path in paths]
            for upload in uploads:
                upload.result()
    store.put(f"eval/{RECORD_NAME}", records["eval"].model_dump_json().encode())
    if not store.put_if_absent(f"train/{RECORD_NAME}", records["train"].model_dump_json().encode()):
        raise Conflict(
            "someone else imported to this destination meanwhile",
            got=f"a {RECORD_NAME} in {store.uri}/train",
            allowed="one import to a destination",
            fix="choose another destination",
        )
    return Published(_uris(destination), records, len(paths), size_bytes)


def _write_files(tables: Iterable[pa.Table], directory: Path) -> None:
    writer: pq.ParquetWriter | None = None
    written_bytes = number = 0
    for table in tables:
        if writer is None:
            plain = [field.name for field in table.schema if not _is_binary(field.type)]
            writer = pq.ParquetWriter(
                directory / f"part-{number:05d}.parquet",
                table.schema,
                # Image files are compressed already.
                compression={name: "zstd" if name in plain else "none" for name in table.column_names},
                use_dictionary=plain,
                write_page_checksum=True,
            )
        group_rows = max(1, min(GROUP_ROWS, GROUP_BYTES * table.num_rows // max(1, table.nbytes)))
        writer.write_table(table, row_group_size=group_rows)
        written_bytes += table.nbytes
        if written_bytes >= _FILE_BYTES:
            writer.close()
            writer, written_bytes, number = None, 0, number + 1
    if writer is not None:
        writer.close()


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _uris(destination: str) -> dict[str, str]:
    return {split: Location.parse(destination).child(split).uri for split in SPLITS}


def _claimed(store: Store) -> Conflict:
    return Conflict(
        "another import to this destination has begun and not ended",
        got=f"'{_CLAIM}' in {store.uri}",
        allowed="one import to a destination",
        fix=f"wait for it; if it was killed, delete '{_CLAIM}', 'train' and 'eval' there",
    )
