"""Reading row groups of files that are damaged, changed under a run, or not text: who is told what."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from cluster.errors import BadInput, Damaged, StorageError
from training.data import parquet
from training.data.dataset import Dataset
from training.data.footers import find_files

ROWS = 60
COLUMNS = ["x", "word", "label"]


def write(path: Path, seed: int = 0, **changes: Any) -> Path:
    rng = np.random.default_rng(seed)
    columns = {
        "x": rng.normal(size=ROWS),
        "word": [f"w{n}" for n in range(100, 100 + ROWS)],
        "label": rng.integers(0, 3, ROWS),
    }
    options = {"compression": "none", "row_group_size": 30, "use_dictionary": False}
    pq.write_table(pa.table(columns | changes), path, **options)
    return path


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_pages_that_cannot_be_decoded_are_damage_and_not_the_networks_fault(
    tmp_path: Path, compression: str
) -> None:
    """Without checksums Arrow reports them as it does a store that fails, which is asked again for long."""
    path = tmp_path / "a.parquet"
    table = pa.table({"x": np.random.default_rng(0).normal(size=500), "label": [0, 1] * 250})
    pq.write_table(table, path, compression=compression, use_dictionary=False)
    whole = path.read_bytes()
    dataset = Dataset.open(str(tmp_path), cache_bytes=0)
    # The header of the first page, and what it announces.
    path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    for _ in range(2):
        with pytest.raises(Damaged, match=r"row group 0 of 'a\.parquet'"):
            dataset.read_group(0, ["x", "label"])


def test_a_store_that_fails_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet")
    dataset = Dataset.open(str(tmp_path), cache_bytes=0)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError("the connection was reset")

    monkeypatch.setattr(parquet, "_decoded", failing)
    monkeypatch.setattr(parquet, "_fetched", failing)
    with pytest.raises(StorageError, match="reading row group 0") as caught:
        dataset.read_group(0, COLUMNS)
    assert not isinstance(caught.value, Damaged)
    assert "connection" in caught.value.got


def test_what_can_be_read_after_all_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet")
    dataset = Dataset.open(str(tmp_path), cache_bytes=0)
    wanted = dataset.read_group(1, COLUMNS)
    real, calls = parquet._decoded, []

    def first_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise OSError("Unexpected end of stream")
        return real(*args)

    monkeypatch.setattr(parquet, "_decoded", first_fails)
    assert dataset.read_group(1, COLUMNS) == wanted
    assert len(calls) == 2


def test_a_file_rewritten_with_the_same_size_is_noticed_when_opened_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 0)
    dataset = Dataset.open(str(tmp_path), cache_bytes=0)
    other = write(tmp_path / "other", 1)
    assert other.stat().st_size == path.stat().st_size
    os.replace(other, path)
    with pytest.raises(Damaged, match=r"'a\.parquet' was changed while in use"):
        dataset.read_group(0, COLUMNS)


@pytest.mark.parametrize("column", ["word", "label"])
def test_text_that_is_not_utf8_is_refused_by_row(tmp_path: Path, column: str) -> None:
    words = [b"fine"] * ROWS
    words[47] = b"\xff\xfe"
    text = pa.array(words, pa.binary()).view(pa.string())
    write(tmp_path / "a.parquet", **{column: text})
    dataset = Dataset.open(str(tmp_path))
    dataset.read_group(0, COLUMNS)
    with pytest.raises(BadInput, match=rf"row 17 of row group 1 of 'a\.parquet'.*'{column}'"):
        dataset.read_group(1, COLUMNS)


def test_an_object_whose_path_has_an_empty_part_is_taken() -> None:
    """Object stores allow two slashes in a row."""

    class Listing:
        def get_file_info(self, of: Any) -> Any:
            if isinstance(of, str):
                return SimpleNamespace(type=fs.FileType.Directory)
            paths = ["data/sub//a.parquet", "data/.hidden//b.parquet"]
            return [SimpleNamespace(type=fs.FileType.File, path=path, size=1) for path in paths]

    assert find_files(Listing(), "data", "s3://data") == [("data/sub//a.parquet", "sub//a.parquet", 1)]
