"""The Parquet files of a dataset: finding them, and reading their footers safely.

Only plain columns are taken: numbers, booleans, strings and bytes. The reason is safety as much as
simplicity: a Parquet file can carry a pickled Arrow extension type in its footer, which Arrow hands
to whatever library has registered the type, as soon as the schema is looked at. So a footer is
fetched as bytes and searched for extension types before pyarrow parses it.

Strings and bytes are widened to their `large_` types, and dictionaries are resolved, so that files
written by different tools agree and tables of any size can be joined.

Knows nothing of row groups' contents, their order, statistics or tasks.
"""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pyarrow import types as pat

from cluster.errors import BadInput, NotFound, StorageError, shown
from training.data.patience import Patience

SUFFIXES = (".parquet", ".pq")
_TAIL_BYTES = 64 * 1024
_MAX_FOOTER_BYTES = 256 * 1024 * 1024
_PARALLEL_FOOTERS = 16


@dataclass(frozen=True)
class DataFile:
    """One Parquet file. `name` is its path below the dataset; `digest` is of its footer."""

    path: str
    name: str
    size_bytes: int
    digest: str
    metadata: Any  # pyarrow.parquet.FileMetaData
    schema: Any  # pyarrow.Schema, as `training.data.parquet.read_group` gives it
    etag: str
    """What the store calls these contents; empty where it calls them nothing, as a disk does."""


def find_files(filesystem: fs.FileSystem, root: str, uri: str) -> list[tuple[str, str, int]]:
    """(path, name below `root`, size in bytes) of each Parquet file, sorted by name.

    Names that begin with '.' or '_' are passed over at any depth, and so is whatever isn't called
    `.parquet` or `.pq`. A `root` that is a file is taken whatever its name.

    Raises:
        NotFound: there is nothing at `root`.
        BadInput: there is no Parquet file below it.
        StorageError: the store can't be read.
    """
    try:
        found = filesystem.get_file_info(root)
        if found.type == fs.FileType.File:
            return [(root, root.rsplit("/", 1)[-1], found.size)]
        inside = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise unreadable(f"listing {uri}", error) from None
    if found.type == fs.FileType.NotFound and not inside:
        raise NotFound(
            "there is no dataset here",
            got=uri,
            allowed="a folder of Parquet files, or one Parquet file",
            fix="check the path, or make the dataset with `tandem data import`",
        )
    files = [(i.path, i.path[len(root) :].lstrip("/"), i.size) for i in inside if i.type == fs.FileType.File]
    taken = [
        file
        for file in files
        if file[1].lower().endswith(SUFFIXES)
        and not any(part.startswith((".", "_")) for part in file[1].split("/"))
    ]
    if not taken:
        others = ", ".join(name for _, name, _ in files[:3])
        raise BadInput(
            "the dataset has no Parquet file",
            got=f"{uri} with {len(files)} files" + (f", such as {shown(others)}" if others else ""),
            allowed="files called .parquet or .pq, whose path has no part that begins with '.' or '_'",
            fix="make Parquet from CSV or images with `tandem data import`",
        )
    return sorted(taken, key=lambda file: file[1])


def read_footers(
    filesystem: fs.FileSystem, files: list[tuple[str, str, int]], patience: Patience
) -> list[DataFile]:
    """The files with their footers, read in parallel, checked to have the same columns.

    Raises:
        BadInput: not Parquet, a column of a type that isn't taken, or columns that differ.
        StorageError: the store can't be read.
    """
    with ThreadPoolExecutor(min(_PARALLEL_FOOTERS, len(files)), "tandem-footers") as pool:
        read = list(pool.map(lambda file: patience.read(lambda: _read_footer(filesystem, *file)), files))
    for other in read[1:]:
        _check_same_columns(read[0], other)
    return read


def _read_footer(filesystem: fs.FileSystem, path: str, name: str, size_bytes: int) -> DataFile:
    try:
        with filesystem.open_input_file(path) as source:
            footer = footer_bytes(source, size_bytes)
            etag = etag_of(source)
    except OSError as error:
        raise unreadable(f"reading the footer of '{name}'", error) from None
    if footer is None:
        raise _not_parquet(name, f"{size_bytes} bytes that don't end in a Parquet footer")
    if any(form in footer for form in _EXTENSION_MARKS):
        raise BadInput(
            f"'{name}' has a column of an Arrow extension type",
            got="an extension type, which may carry code to run",
            allowed=_TAKEN,
            fix="write the column as plain bytes, numbers or strings",
        )
    try:
        reader = pq.ParquetFile(pa.BufferReader(footer))
        schema = pa.schema([_plain_field(field, name) for field in reader.schema_arrow])
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(name, str(error)) from None
    repeated = {column for column in schema.names if schema.names.count(column) > 1}
    if repeated:
        raise BadInput(
            f"'{name}' has two columns of one name",
            got=", ".join(sorted(repeated)),
            allowed="column names that differ",
            fix="rename one of them",
        )
    digest = hashlib.sha256(footer).hexdigest()
    return DataFile(path, name, size_bytes, digest, reader.metadata, schema, etag)


def footer_bytes(source: pa.NativeFile, size_bytes: int) -> bytes | None:
    """The footer with its length and magic, in one request if it is small; None if there is none.

    Raises:
        OSError: it can't be read.
    """
    tail = read_at(source, min(_TAIL_BYTES, size_bytes), max(0, size_bytes - _TAIL_BYTES))
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        return None
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length + 4 > size_bytes or length > _MAX_FOOTER_BYTES:
        return None
    return tail[-length:] if length <= len(tail) else read_at(source, length, size_bytes - length)


def read_at(source: pa.NativeFile, size: int, offset: int) -> bytes:
    """So many bytes from `offset` on. Raises: OSError, also when fewer come."""
    data = bytes(source.read_at(size, offset))
    if len(data) != size:
        raise OSError(f"{len(data)} bytes came of {size}")
    return data


def etag_of(source: pa.NativeFile) -> str:
    """See `DataFile.etag`."""
    found = source.metadata() or {}
    return next((value.decode() for key, value in found.items() if key.lower() == b"etag"), "")


def _base64_forms(word: bytes) -> list[bytes]:
    """What `word` looks like within a base64 text, at each of the three alignments it can have."""
    forms = []
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + word)
        # Drop the characters that also hold bits of what stands before or after.
        first = -(-shift * 8 // 6)
        last = (shift + len(word)) * 8 // 6
        forms.append(text[first:last])
    return forms


# The Arrow schema stands in the footer as base64 of a flatbuffer; a plain mark is looked for as well.
_EXTENSION_MARKS = [*_base64_forms(b"ARROW:extension:name"), b"ARROW:extension:name"]
_TAKEN = "columns of integers, floats, booleans, strings or bytes"


def _plain_field(field: pa.Field, name: str) -> pa.Field:
    kind = field.type
    if pat.is_dictionary(kind):
        kind = kind.value_type
    if pat.is_string(kind) or pat.is_large_string(kind):
        return pa.field(field.name, pa.large_string())
    if pat.is_binary(kind) or pat.is_large_binary(kind):
        return pa.field(field.name, pa.large_binary())
    if pat.is_integer(kind) or pat.is_floating(kind) or pat.is_boolean(kind):
        return pa.field(field.name, kind)
    raise BadInput(
        f"column '{field.name}' of '{name}' has a type that isn't taken",
        got=shown(str(field.type)),
        allowed=_TAKEN,
        fix=_fix_for(kind),
    )


def _fix_for(kind: pa.DataType) -> str:
    if pat.is_temporal(kind):
        return "store times as numbers, such as seconds since 1970 in float64"
    if pat.is_decimal(kind):
        return "store it as float64, or as an int64 of the smallest unit"
    if pat.is_null(kind):
        return "drop the column: it holds nothing"
    if pat.is_nested(kind):
        return "store each field as a column of its own; an image as a binary column of its file's bytes"
    return "convert or drop the column"


def _check_same_columns(first: DataFile, other: DataFile) -> None:
    ours = {field.name: field.type for field in first.schema}
    theirs = {field.name: field.type for field in other.schema}
    for column in sorted(ours.keys() | theirs.keys()):
        if ours.get(column) != theirs.get(column):
            raise BadInput(
                f"column '{column}' of '{other.name}' is not what it is in '{first.name}'",
                got=f"{theirs.get(column, 'no such column')} against {ours.get(column, 'no such column')}",
                allowed="the same columns, of the same types, in every file",
                fix=f"write '{other.name}' anew, or move it out of the dataset",
            )


def _not_parquet(name: str, got: str) -> BadInput:
    return BadInput(
        f"'{name}' is not a Parquet file",
        got=shown(got),
        allowed="Parquet, not encrypted",
        fix="write the file anew, or move it out of the dataset",
    )


def unreadable(doing: str, error: Exception) -> StorageError:
    """The error for what a store failed at: `doing` in words, such as "listing x"."""
    return StorageError(
        f"{doing} failed",
        got=shown(str(error).split("\n", 1)[0]),
        allowed="a store that these credentials may list and read",
        fix="check the credentials, the endpoint and the network, then try again",
    )
