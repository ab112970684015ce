"""Datasets: numbering, reading, identity, facts, and everything that is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import BadInput, Damaged, NotFound, TandemError
from training.data import statistics
from training.data.dataset import Dataset
from training.data.publish import publish
from training.data.record import RECORD_NAME, Record


def write(path: Path, columns: dict | pa.Table, group_rows: int = 10, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=group_rows, **options)


def png(width: int, height: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def numbered(tmp_path: Path) -> Dataset:
    """Rows 0 to 99 in three files and nested folders, with things that must be passed over."""
    for name, first, rows in (("a.parquet", 0, 35), ("b/c.parquet", 35, 25), ("b/d/e.pq", 60, 40)):
        ids = np.arange(first, first + rows)
        words = pa.array([f"w{i}" for i in ids]).dictionary_encode()
        write(tmp_path / name, {"id": ids, "label": ids % 3, "word": words})
    for name in ("_temporary/x.parquet", ".hidden.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not data")
    return Dataset.open(str(tmp_path))


def test_rows_are_numbered_by_path_and_group(numbered: Dataset) -> None:
    assert numbered.files == ("a.parquet", "b/c.parquet", "b/d/e.pq")
    assert numbered.rows == 100
    assert [group.rows for group in numbered.row_groups] == [10, 10, 10, 5, 10, 10, 5, 10, 10, 10, 10]
    for index, group in enumerate(numbered.row_groups):
        ids = numbered.read_group(index, ["id"])["id"].to_pylist()
        assert ids == list(range(group.first_row, group.first_row + group.rows))


@pytest.mark.parametrize("cache_bytes", [0, 400, 10**9])
def test_rows_come_in_the_order_asked_for(numbered: Dataset, cache_bytes: int) -> None:
    dataset = Dataset.open(numbered.uri, cache_bytes=cache_bytes)
    ids = np.random.default_rng(0).integers(0, 100, 300)
    table = dataset.read_rows(ids, ["word", "id"])
    assert table.column_names == ["word", "id"]
    assert table["id"].to_pylist() == ids.tolist()
    assert table["word"].to_pylist() == [f"w{i}" for i in ids]
    assert table["word"].type == pa.large_string()
    assert dataset._cache._held_bytes <= cache_bytes
    assert dataset.read_rows(np.empty(0, np.int64), ["id"]).schema == pa.schema([("id", pa.int64())])


def test_one_file_is_a_dataset(numbered: Dataset) -> None:
    one = Dataset.open(numbered.uri + "/b/c.parquet")
    assert one.read_rows(np.array([24, 0]), ["id"])["id"].to_pylist() == [59, 35]
    assert one.facts("label").labels == ("0", "1", "2")


def test_the_fingerprint_is_of_names_and_contents(numbered: Dataset, tmp_path: Path) -> None:
    def opened() -> str:
        return Dataset.open(str(tmp_path)).fingerprint

    before = opened()
    assert before == numbered.fingerprint
    (tmp_path / "_SUCCESS").write_text("")
    assert opened() == before
    ids = np.arange(35)
    ids[7] = 1000
    words = pa.array([f"w{i}" for i in range(35)]).dictionary_encode()
    original = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", {"id": ids, "label": np.arange(35) % 3, "word": words})
    assert opened() != before
    (tmp_path / "a.parquet").write_bytes(original)
    assert opened() == before
    (tmp_path / "b/c.parquet").rename(tmp_path / "b/b.parquet")
    assert opened() != before
    numbered.check_unchanged(before)
    with pytest.raises(BadInput, match="changed since"):
        Dataset.open(str(tmp_path)).check_unchanged(before)


def test_the_plan_covers_the_dataset(numbered: Dataset) -> None:
    plan = numbered.plan(3)
    assert plan.rows_per_epoch == 100
    assert plan.fingerprint == numbered.fingerprint
    assert sorted(numbered.read_rows(plan.row_ids(0, 0, 100), ["id"])["id"].to_pylist()) == list(range(100))


def test_empty_row_groups_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": pa.array([], pa.int64())})
    with pytest.raises(BadInput, match="no rows"):
        Dataset.open(str(tmp_path))
    write(tmp_path / "b.parquet", {"x": [1, 2]})
    assert [group.rows for group in Dataset.open(str(tmp_path)).row_groups] == [2]


def four_parts(error: TandemError) -> bool:
    return set(error.parts()) == {"failed", "got", "allowed", "fix"}


def test_nothing_there_and_nothing_usable_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no dataset") as nothing:
        Dataset.open(str(tmp_path / "nowhere"))
    assert four_parts(nothing.value)
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(BadInput, match=r"data\.csv") as unusable:
        Dataset.open(str(tmp_path))
    assert four_parts(unusable.value)


def test_columns_that_differ_name_the_file_and_the_column(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1], "y": [1.0]})
    write(tmp_path / "b.parquet", {"y": [1.0], "x": [1]})
    Dataset.open(str(tmp_path))  # the order of columns may differ
    write(tmp_path / "c.parquet", {"x": [1], "y": ["one"]})
    with pytest.raises(BadInput, match=r"'y' of 'c\.parquet'.*'a\.parquet'") as differ:
        Dataset.open(str(tmp_path))
    assert four_parts(differ.value)


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        (pa.array([1], pa.timestamp("us")), "seconds since 1970"),
        (pa.array([1], pa.date32()), "seconds since 1970"),
        (pa.array([1], pa.decimal128(5, 2)), "float64"),
        (pa.array([[1]], pa.list_(pa.int64())), "column of its own"),
        (pa.array([{"bytes": b""}]), "binary column"),
        (pa.array([None], pa.null()), "drop"),
    ],
)
def test_types_that_no_model_takes_are_refused(tmp_path: Path, values: pa.Array, fix: str) -> None:
    write(tmp_path / "a.parquet", {"x": values})
    with pytest.raises(BadInput, match="type that isn't taken") as refused:
        Dataset.open(str(tmp_path))
    assert fix in refused.value.fix


class Trap(pa.ExtensionType):
    """What an attacker would register, or rather rely on another library to have registered."""

    sprung = False

    def __init__(self) -> None:
        super().__init__(pa.int64(), "tandem.test.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Trap":
        cls.sprung = True
        return cls()


def test_extension_types_are_refused_before_arrow_sees_the_schema(tmp_path: Path) -> None:
    values = pa.ExtensionArray.from_storage(Trap(), pa.array([1, 2]))
    # Names of several lengths put the mark at each alignment of its base64 text.
    for name in ("x", "xx", "xxx", "xxxxx"):
        pq.write_table(pa.table({"a": [1, 2], name: values}), tmp_path / "a.parquet")
        pa.register_extension_type(Trap())
        try:
            Trap.sprung = False
            with pytest.raises(BadInput, match="extension type"):
                Dataset.open(str(tmp_path))
            assert not Trap.sprung
            pq.ParquetFile(tmp_path / "a.parquet").close()
            assert Trap.sprung  # so the trap does work
        finally:
            pa.unregister_extension_type("tandem.test.trap")


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "tiny", "text", "long-footer"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.parquet"
    write(path, {"x": list(range(100))})
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "zeroed": data[:-200] + b"\0" * 192 + data[-8:],
            "tiny": b"PAR1",
            "text": b"a,b\n" * 100,
            "long-footer": data[:-8] + b"\xff\xff\xff\x7fPAR1",
        }[damage]
    )
    with pytest.raises(BadInput, match=r"'broken\.parquet' is not a Parquet file"):
        Dataset.open(str(tmp_path))


def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": list(range(100))})
    dataset = Dataset.open(str(tmp_path))
    write(tmp_path / "a.parquet", {"x": list(range(1000))})
    with pytest.raises(Damaged, match="changed while in use"):
        dataset.read_group(0, ["x"])


def test_damaged_pages_are_an_error_of_storage(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": np.random.default_rng(0).random(1000)}, 1000, compression="zstd")
    dataset = Dataset.open(str(tmp_path))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[10:2000] = bytes(1990)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(TandemError, match=r"row group 0 of 'a\.parquet'"):
        dataset.read_group(0, ["x"])


def test_no_such_column_lists_those_there_are(numbered: Dataset) -> None:
    with pytest.raises(BadInput, match="no column 'nope'") as error:
        numbered.read_group(0, ["nope"])
    assert "id, label, word" in error.value.got
    with pytest.raises(BadInput, match="no such label"):
        numbered.facts("nope")


def test_facts_of_every_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(3, 2, 95)
    numbers[5] = np.nan
    write(
        tmp_path / "a.parquet",
        {
            "float": pa.array([None, *numbers.tolist()]),
            "int": pa.array([None, *range(95)], pa.int16()),
            "constant": [7] * 96,
            "empty": pa.array([None] * 96, pa.float32()),
            "bool": [True, False, None] * 32,
            "word": ["b", "a", None, ""] * 24,
            "text": ["some words"] * 95 + [None],
            "image": [png(3, 9)] * 48 + [png(5, 4)] * 48,
            "audio": [b"RIFF"] * 96,
            "label": [10, 9, 2] * 32,
        },
    )
    facts = Dataset.open(str(tmp_path)).facts("label")
    columns = facts.columns
    real = numbers[~np.isnan(numbers)]
    assert facts.rows == 96
    assert columns["float"].missing_rows == 2
    assert columns["float"].mean == pytest.approx(real.mean(), rel=1e-12)
    assert columns["float"].std == pytest.approx(real.std(), rel=1e-12)
    assert (columns["int"].kind, columns["int"].missing_rows) == ("number", 1)
    assert (columns["constant"].mean, columns["constant"].std) == (7, 0)
    assert (columns["empty"].missing_rows, columns["empty"].std) == (96, 0)
    assert columns["bool"].categories == ("false", "true")
    assert (columns["word"].categories, columns["word"].missing_rows) == (("a", "b"), 48)
    assert (columns["text"].kind, columns["text"].missing_rows) == ("text", 1)
    image = columns["image"].image
    assert image is not None
    assert (image.width, image.height, image.channels) == (5, 9, 1)
    assert columns["audio"].kind == "audio"
    assert facts.labels == ("2", "9", "10")  # integers in order of value


def test_facts_do_not_depend_on_row_groups_beyond_rounding(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(1e6, 1, 5000)
    for name, rows in (("a", 7), ("b", 5000)):
        write(tmp_path / name / "x.parquet", {"x": values, "y": values > 1e6}, rows)
    a, b = (Dataset.open(str(tmp_path / name)).facts("y").columns["x"] for name in "ab")
    assert a.mean == pytest.approx(values.mean(), rel=1e-15)
    assert a.std == pytest.approx(b.std, rel=1e-9)
    assert a.std == pytest.approx(values.std(), rel=1e-9)


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (["cat", "dog"] * 600, ("cat", "dog")),
        ([True, False] * 600, ("false", "true")),
        (list(range(1000)) + [0] * 200, tuple(str(i) for i in range(1000))),
        (list(range(1001)) + [0] * 199, ()),
        ([0.0, 1.0] * 600, ()),
    ],
)
def test_what_the_label_is(tmp_path: Path, label: list, classes: tuple) -> None:
    write(tmp_path / "a.parquet", {"x": [1.0] * 1200, "y": label}, 100)
    facts = Dataset.open(str(tmp_path)).facts("y")
    assert facts.labels == classes
    assert facts.columns["y"].kind == ("category" if classes else "number")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"x": [1.0, float("inf")], "y": [0, 1]}, "infinite value"),
        ({"x": [1.0, -1.7e308], "y": [0, 1]}, "too far apart"),
        ({"x": [1, 2], "y": ["a", None]}, "missing values"),
        ({"x": [1, 2], "y": ["a", ""]}, "missing values"),
        ({"x": [1, 2], "y": [1, None]}, "missing values"),
        ({"x": [1, 2], "y": [3, 3]}, "one class"),
        ({"x": [b"1", b"2"], "y": [0, 1]}, "doesn't say of what"),
        ({"x": [1, 2], "y": [b"0", b"1"]}, "doesn't say of what"),
        ({"image": [png(2, 2), b"GIF89a"], "y": [0, 1]}, "image in row 1"),
        ({"image": [None, png(2, 2)], "y": [0, 1]}, "image in row 0"),
    ],
)
def test_columns_that_no_task_can_use(tmp_path: Path, columns: dict, match: str) -> None:
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(BadInput, match=match) as error:
        Dataset.open(str(tmp_path)).facts("y")
    assert four_parts(error.value)


def test_errors_in_facts_name_the_datasets_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1.0] * 34 + [float("inf")], "y": [0, 1] * 17 + [0]})
    with pytest.raises(BadInput) as error:
        Dataset.open(str(tmp_path)).facts("y")
    assert error.value.got == "inf in row 34"


def test_too_many_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_CATEGORIES", 50)
    for count in (50, 51):
        write(tmp_path / "a.parquet", {"x": [f"{i}" for i in range(count)] * 2, "y": [0, 1] * count})
        if count == 50:
            assert len(Dataset.open(str(tmp_path)).facts("y").columns["x"].categories or ()) == 50
            continue
        with pytest.raises(BadInput, match="too many different values"):
            Dataset.open(str(tmp_path)).facts("y")


def test_stored_facts_are_taken_only_if_they_are_of_this_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1.0, 2.0], "y": [0, 1]})
    facts = Dataset.open(str(tmp_path)).facts("y")
    marked = facts.model_copy(
        update={"columns": {**facts.columns, "x": facts.columns["x"].model_copy(update={"mean": 42.0})}}
    )
    record = Record(types={"x": "double", "y": "int64"}, facts=marked)
    (tmp_path / RECORD_NAME).write_text(record.model_dump_json())
    assert Dataset.open(str(tmp_path)).facts("y") == marked
    assert Dataset.open(str(tmp_path)).facts("x").label == "x"
    other = {**json.loads(record.model_dump_json())}
    other["facts"]["fingerprint"] = "other"
    for text in (json.dumps(other), "{", "[]", '{"format": 2}'):
        (tmp_path / RECORD_NAME).write_text(text)
        assert Dataset.open(str(tmp_path)).facts("y") == facts


def test_a_flipped_bit_is_named_by_file_and_row_group(tmp_path: Path) -> None:
    table = pa.table({"x": np.arange(400.0), "label": np.arange(400) % 2})
    uri = publish(
        {"train": [table.slice(0, 200), table.slice(200)], "eval": [table]}, str(tmp_path), label="label"
    ).uris["train"]
    file = next(Path(tmp_path, "train").glob("*.parquet"))
    data = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    file.write_bytes(bytes(data))
    dataset = Dataset.open(uri)
    assert dataset.read_group(0, ["x"]).num_rows == 200
    with pytest.raises(Damaged, match=r"row group 1 of 'part-00000\.parquet' isn't what was written"):
        dataset.read_group(1, ["x"])
