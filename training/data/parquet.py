"""Reading row groups of Parquet files whose footers were read (`training.data.footers`).

Whatever goes wrong is told apart: a store that fails, bytes that aren't what was written, a file that
was changed since its footer was read, and text that isn't text.

Knows nothing of rows' order, statistics or tasks.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pyarrow import types as pat

from cluster.errors import BadInput, Damaged, shown
from training.data.footers import DataFile, etag_of, footer_bytes, read_at, unreadable


def open_file(filesystem: fs.FileSystem, file: DataFile) -> pa.NativeFile:
    """The file, open for `read_group`.

    Raises:
        Damaged: it is no longer the file whose footer was read.
        StorageError: it can't be opened.
    """
    try:
        source = filesystem.open_input_file(file.path)
        size, etag = source.size(), etag_of(source)
        # A disk gives contents no name of their own, but reading a footer again costs nothing there.
        known = bool(etag) or size != file.size_bytes
        footer = b"" if known else footer_bytes(source, size) or b""
    except OSError as error:
        raise unreadable(f"opening '{file.name}'", error) from None
    same = etag == file.etag if known else hashlib.sha256(footer).hexdigest() == file.digest
    if size != file.size_bytes or not same:
        raise Damaged(
            f"'{file.name}' was changed while in use",
            got=f"{size} bytes" if size != file.size_bytes else "other contents of the same size",
            allowed=f"the {file.size_bytes} bytes that were there when the dataset was opened",
            fix="write new data under new names; start again from the dataset as it is now",
        )
    return source


def read_group(source: pa.NativeFile, file: DataFile, group: int, columns: list[str]) -> pa.Table:
    """Some columns of one row group, in the order asked for. Several threads may share `source`.

    Raises:
        BadInput: text that isn't UTF-8; names the row.
        StorageError: it can't be read; `Damaged` if the bytes make no sense, or a page differs from the
            checksum that it was written with. Files without checksums are taken as they are.
    """
    try:
        table = _decoded(source, file, group, columns)
    except pa.ArrowException as error:
        raise _damaged(file, group, error) from None
    except OSError:
        table = _read_apart(source, file, group, columns)
    rows = file.metadata.row_group(group).num_rows
    if table.num_rows != rows:
        raise _damaged(file, group, ValueError(f"{table.num_rows} rows of {rows}"))
    _check_text(table, file, group)
    return table


def _decoded(source: Any, file: DataFile, group: int, columns: list[str]) -> pa.Table:
    reader = pq.ParquetFile(source, metadata=file.metadata, pre_buffer=True, page_checksum_verification=True)
    table = reader.read_row_group(group, columns=columns, use_threads=False)
    return table.select(columns).cast(pa.schema([file.schema.field(name) for name in columns]))


def _read_apart(source: pa.NativeFile, file: DataFile, group: int, columns: list[str]) -> pa.Table:
    """Read first, decode then: Arrow reports bytes that can't be decoded as it does a store that fails."""
    try:
        piece = _fetched(source, file, group)
    except OSError as error:
        raise unreadable(f"reading row group {group} of '{file.name}'", error) from None
    try:
        return _decoded(pa.PythonFile(piece, mode="r"), file, group, columns)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, group, error) from None


def _fetched(source: pa.NativeFile, file: DataFile, group: int) -> _Piece:
    """The bytes of a row group's columns."""
    found = file.metadata.row_group(group)
    columns = [found.column(number) for number in range(found.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
    start, end = min(starts), min(max(ends), file.size_bytes)
    return _Piece(read_at(source, end - start, start), start, file.size_bytes)


class _Piece(io.RawIOBase):
    """A part of a file, in memory, at its place in the file; around it there is nothing to be read."""

    def __init__(self, data: bytes, offset: int, size_bytes: int) -> None:
        super().__init__()
        self._data = data
        self._offset = offset
        self._size_bytes = size_bytes
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size_bytes}[whence]
        self._place = base + place
        return self._place

    def read(self, size: int = -1) -> bytes:
        first = self._place - self._offset
        last = len(self._data) if size < 0 else first + size
        found = self._data[first:last] if first >= 0 else b""
        self._place += len(found)
        return found


def _check_text(table: pa.Table, file: DataFile, group: int) -> None:
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pat.is_large_string(column.type):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:
                raise _not_text(column, name, file, group) from None


def _not_text(column: pa.ChunkedArray, name: str, file: DataFile, group: int) -> BadInput:
    values = [value or b"" for value in column.cast(pa.large_binary()).to_pylist()]
    row = next(row for row, value in enumerate(values) if not _is_text(value))
    return BadInput(
        f"row {row} of row group {group} of '{file.name}' has no text in column '{name}'",
        got=shown(values[row]),
        allowed="strings in UTF-8",
        fix="convert the column where it is made, or store it as bytes",
    )


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _damaged(file: DataFile, group: int, error: Exception) -> Damaged:
    return Damaged(
        f"row group {group} of '{file.name}' isn't what was written",
        got=shown(str(error)),
        allowed="valid Parquet, whose pages agree with their checksums where they have any",
        fix="write the file anew, or restore it; check the disk that it was on",
    )
