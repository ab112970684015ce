"""Imports: CSV and images become datasets that say what they hold; mistakes name the file."""

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.errors import BadInput, Conflict, NotFound, StorageError
from cluster.storage import Store, open_store
from training.data import image_folder as image_folder_module
from training.data import publish, samples
from training.data.dataset import Dataset
from training.data.importing import import_csv, import_images
from training.data.record import read_record
from training.data.scan import scanned
from training.data.split import split_rows

CSV = "size,colour,zip,label\n" + "".join(
    f"{i if i % 5 else ''},{'red' if i % 2 else 'blue'},0{i % 7},{'yes' if i % 4 == 0 else 'no'}\n"
    for i in range(200)
)


def csv(tmp_path: Path, text: str = CSV) -> str:
    path = tmp_path / "data.csv"
    path.write_text(text)
    return str(path)


def rows(uri: str) -> list[tuple]:
    dataset = Dataset.open(uri)
    table = dataset.read_rows(np.arange(dataset.rows), dataset.schema.names)
    return [tuple(row.values()) for row in table.to_pylist()]


def test_a_csv_becomes_two_datasets_with_every_row_once(tmp_path: Path) -> None:
    report = import_csv(csv(tmp_path), str(tmp_path / "out"), label="label")
    assert (report.train_rows, report.eval_rows) == (160, 40)
    assert report.columns == {"size": "number", "colour": "category", "zip": "number", "label": "category"}
    assert report.classes == ("no", "yes")
    assert report.types["size"] == "int64"
    train, held_out = rows(report.train), rows(report.eval)
    expected = [
        (i if i % 5 else None, "red" if i % 2 else "blue", i % 7, "yes" if i % 4 == 0 else "no")
        for i in range(200)
    ]
    assert sorted(map(str, train + held_out)) == sorted(map(str, expected))
    assert sum(row[3] == "yes" for row in held_out) == 10  # a fifth of each class
    assert train != sorted(train, key=str)
    for uri, count in ((report.train, 160), (report.eval, 40)):
        dataset = Dataset.open(uri)
        record = read_record(dataset._filesystem, dataset._root)
        assert record is not None
        assert record.facts == dataset.facts("label")
        again = scanned(dataset.schema, dataset.row_groups, dataset.read_group, "label")
        assert record.facts.columns == again
        assert record.facts.rows == count
    assert not (tmp_path / "out/_import.json").exists()


def test_an_import_can_be_repeated_elsewhere_with_the_same_result(tmp_path: Path) -> None:
    one, two, other = (
        import_csv(csv(tmp_path), str(tmp_path / name), label="label", seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    prints = [Dataset.open(report.train).fingerprint for report in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]


def test_columns_can_be_dropped_or_taken_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(CSV.replace(",", ";").encode()))
    report = import_csv(
        str(path), str(tmp_path / "out"), label="label", drop=["size"], categories=["zip"], delimiter=";"
    )
    assert list(report.columns) == ["colour", "zip", "label"]
    facts = Dataset.open(report.train).facts("label")
    assert facts.columns["zip"].categories == tuple(f"0{i}" for i in range(7))


def test_a_float_label_is_a_regression(tmp_path: Path) -> None:
    text = "x,y\n" + "".join(f"{i},{i * 0.5}\n" for i in range(50))
    report = import_csv(csv(tmp_path, text), str(tmp_path / "out"), label="y", eval_fraction=0.1)
    assert (report.classes, report.columns["y"], report.eval_rows) == ((), "number", 5)


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("", {}, "can't be read as CSV"),
        ("a,label\n1,x\n2\n", {}, "can't be read as CSV"),
        ("a,b\n1,2\n", {}, "no column 'label'"),
        (CSV, {"drop": ["nope"]}, "no column 'nope', named as dropped"),
        (CSV, {"categories": ["nope"]}, "no column 'nope', named as category"),
        (CSV, {"drop": ["size", "colour", "zip"]}, "nothing would be left"),
        (CSV, {"drop": ["label"]}, "nothing would be left"),
        (CSV, {"eval_fraction": 0.0}, "evaluation fraction"),
        (CSV, {"eval_fraction": float("nan")}, "evaluation fraction"),
        (CSV, {"delimiter": "::"}, "delimiter"),
        ("a,a,label\n1,2,x\n", {}, "column 1 .* name that can't be used"),
        (",a,label\n1,2,x\n", {}, "column 1 .* name that can't be used"),
        ("a,label\n2020-01-01,x\n2020-01-02,y\n", {}, "column 'a'"),
        ("a,b,label\n,1,x\n,2,y\n", {}, "column 'a'"),
        ("a,label\n1,x\n2,\n3,y\n", {}, "without a label"),
        ("a,label\n1,x\n2,y\n", {}, "too few rows"),
        ("a,label\n" + "1,x\n" * 50, {}, "one class"),
        ("a,label\n" + "inf,x\n1,y\n" * 50, {}, "infinite"),
    ],
)
def test_mistakes_in_a_csv_are_told_and_leave_nothing_behind(
    tmp_path: Path, text: str, options: dict, match: str
) -> None:
    with pytest.raises(BadInput, match=match) as error:
        import_csv(csv(tmp_path, text), str(tmp_path / "out"), **{"label": "label"} | options)
    assert error.value.got
    assert error.value.allowed
    assert open_store(str(tmp_path / "out")).keys("") == []


def test_a_csv_that_is_not_utf8_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"a,label\n" + "é,x\nü,y\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"UTF-8|column 'a'"):
        import_csv(str(tmp_path / "latin.csv"), str(tmp_path / "out"), label="label")
    with pytest.raises(NotFound, match="no such file"):
        import_csv(str(tmp_path / "nope.csv"), str(tmp_path / "out"), label="label")


def test_a_destination_that_holds_data_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_csv(csv(tmp_path), str(out), label="label")
    before = sorted((path, path.read_bytes()) for path in out.rglob("*") if path.is_file())
    with pytest.raises(Conflict, match="holds data already") as error:
        import_csv(csv(tmp_path), str(out), label="label")
    assert set(error.value.parts()) == {"failed", "got", "allowed", "fix"}
    assert before == sorted((path, path.read_bytes()) for path in out.rglob("*") if path.is_file())


def test_another_import_under_way_is_respected(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "_import.json").write_text("someone")
    with pytest.raises(Conflict, match="has begun"):
        import_csv(csv(tmp_path), str(out), label="label")
    assert [path.name for path in out.iterdir()] == ["_import.json"]


@pytest.mark.parametrize("failing_put", [1, 2, 3, 4])
def test_an_upload_that_fails_leaves_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_put: int
) -> None:
    puts = 0

    def failing(what):
        def put(self: Store, key: str, data: bytes) -> object:
            nonlocal puts
            if key != "_import.json":
                puts += 1
                if puts == failing_put:
                    raise StorageError("the store is full")
            return what(self, key, data)

        return put

    monkeypatch.setattr(Store, "put", failing(Store.put))
    monkeypatch.setattr(Store, "put_if_absent", failing(Store.put_if_absent))
    with pytest.raises(StorageError, match="full"):
        import_csv(csv(tmp_path), str(tmp_path / "out"), label="label")
    assert open_store(str(tmp_path / "out")).keys("") == []
    monkeypatch.undo()
    import_csv(csv(tmp_path), str(tmp_path / "out"), label="label")


def test_large_tables_get_row_groups_and_files_of_a_sane_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "GROUP_ROWS", 50)
    monkeypatch.setattr(publish, "_FILE_BYTES", 1)
    table = pa.table({"x": np.arange(120), "label": ["a", "b"] * 60})
    made = publish.publish({"train": [table, table], "eval": [table]}, str(tmp_path), label="label")
    assert made.files == 3
    dataset = Dataset.open(made.uris["train"])
    assert [group.rows for group in dataset.row_groups] == [50, 50, 20] * 2


def image_folder(tmp_path: Path) -> Path:
    for i in range(30):
        mode, suffix = ("RGB", "jpg") if i % 3 == 0 else ("L", "png")
        path = tmp_path / "images" / ("cat" if i % 2 else "dog") / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (4 + i, 6), i).save(path)
    (tmp_path / "images/cat/notes.txt").write_text("not an image")
    (tmp_path / "images/cat/.DS_Store").write_text("hidden")
    return tmp_path / "images"


def test_a_folder_of_images_becomes_two_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder_module, "_IMAGE_GROUP_ROWS", 10)
    monkeypatch.setattr(image_folder_module, "_FILES_AT_ONCE", 7)
    folder = image_folder(tmp_path)
    report = import_images(folder, str(tmp_path / "out"), eval_fraction=0.2)
    assert (report.train_rows, report.eval_rows, report.skipped_files) == (24, 6, 1)
    assert report.classes == ("cat", "dog")
    assert [group.rows for group in Dataset.open(report.train).row_groups] == [10, 10, 4]
    files = {(path.read_bytes(), path.parent.name) for path in folder.rglob("*.[pj][np]g")}
    assert {*rows(report.train), *rows(report.eval)} == files
    image = Dataset.open(report.train).facts("label").columns["image"].image
    assert image is not None
    assert (image.height, image.channels) == (6, 3)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(file, "PNG")
    (folder / "dog/truncated.png").write_bytes(file.getvalue()[:-400])
    with pytest.raises(BadInput, match=r"truncated\.png"):
        import_images(folder, str(tmp_path / "out"))
    assert open_store(str(tmp_path / "out")).keys("") == []


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        import_images(tmp_path / "nope", str(tmp_path / "out"))
    Image.new("L", (2, 2)).save(tmp_path / "flat.png")
    with pytest.raises(BadInput, match="two classes"):
        import_images(tmp_path, str(tmp_path / "out"))


def test_every_class_stays_in_training() -> None:
    classes = ["often"] * 97 + ["twice"] * 2 + ["once"]
    train, held_out = split_rows(classes, 0.5, 0)
    assert sorted([*train, *held_out]) == list(range(100))
    assert {classes[i] for i in train} == {"often", "twice", "once"}
    assert [classes[i] for i in held_out].count("twice") == 1


def test_the_samples_are_what_they_say_and_are_written_once(tmp_path: Path) -> None:
    for write, train_rows, eval_rows, classes in (
        (samples.write_digits, 1438, 359, tuple("0123456789")),
        (samples.write_breast_cancer, 456, 113, ("benign", "malignant")),
        (samples.write_diabetes, 354, 88, ()),
    ):
        destination = str(tmp_path / write.__name__)
        train, held_out = write(destination)
        assert Dataset.open(train).rows == train_rows
        assert Dataset.open(held_out).rows == eval_rows
        assert Dataset.open(train).facts("label").labels == classes
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert write(destination) == (train, held_out)
        assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        fingerprint = Dataset.open(train).fingerprint
        # Interrupted before the commit: what is there is written again, the same.
        (tmp_path / write.__name__ / "train/_tandem.json").unlink()
        write(destination)
        assert Dataset.open(train).fingerprint == fingerprint


def test_diamonds_are_where_their_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the package's file is read: a package that can't be imported will do."""
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match="the diamonds are not on this machine"):
        samples.write_diamonds(str(tmp_path / "none"))
    monkeypatch.undo()
    data = tmp_path / "site" / "plotnine" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise AssertionError")
    lines = [f'{n / 10},"{"AB"[n % 2]}",{n}' for n in range(10)]
    (data / "diamonds.csv").write_text("\n".join(['"carat","cut","price"', *lines]))
    monkeypatch.syspath_prepend(tmp_path / "site")
    train, held_out = samples.write_diamonds(str(tmp_path / "out"))
    assert (Dataset.open(train).rows, Dataset.open(held_out).rows) == (8, 2)
    columns = Dataset.open(train).facts("label").columns
    assert {name: column.kind for name, column in columns.items()} == {
        "carat": "number",
        "cut": "category",
        "label": "number",
    }
