"""Datasets on a real S3 server: imported to it, read from it, and missing from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Fault, FaultProxy, Kind
from seaweed import Seaweed

from cluster.errors import Conflict, NotFound, StorageError, TandemError
from cluster.storage import open_store
from training.data import samples
from training.data.dataset import Dataset
from training.data.importing import import_csv
from training.data.patience import IMPATIENT, Patience
from training.data.record import read_record
from training.data.scan import scanned


def test_a_csv_is_imported_to_s3_and_read_back_exactly(s3_env: Seaweed, tmp_path: Path) -> None:
    destination = s3_env.uri(Seaweed.BUCKET, "datasets/csv")
    open_store(destination).put(
        "source.csv", b"x,label\n" + b"".join(b"%d,%d\n" % (i, i % 3) for i in range(3000))
    )
    report = import_csv(destination + "/source.csv", destination, label="label")
    train, held_out = Dataset.open(report.train), Dataset.open(report.eval)
    ids = np.random.default_rng(0).permutation(train.rows)
    held_ids = np.arange(held_out.rows)
    seen = train.read_rows(ids, ["x"])["x"].to_pylist() + held_out.read_rows(held_ids, ["x"])["x"].to_pylist()
    assert sorted(seen) == list(range(3000))
    record = read_record(train._filesystem, train._root)
    assert record is not None
    assert record.facts == train.facts("label")
    assert record.facts.columns == scanned(train.schema, train.row_groups, train.read_group, "label")
    # The same files in a directory are the same dataset.
    for key in open_store(report.train).keys(""):
        if key.endswith(".parquet"):
            (tmp_path / key).write_bytes(open_store(report.train).get(key))
    assert Dataset.open(str(tmp_path)).fingerprint == train.fingerprint
    with pytest.raises(Conflict, match="holds data already"):
        import_csv(destination + "/source.csv", destination, label="label")


def test_one_object_is_a_dataset_without_stored_facts(s3_env: Seaweed) -> None:
    train, _ = samples.write_digits(s3_env.uri(Seaweed.BUCKET, "datasets/digits"))
    assert samples.write_digits(s3_env.uri(Seaweed.BUCKET, "datasets/digits"))[0] == train
    whole = Dataset.open(train)
    one = Dataset.open(train + "/part-00000.parquet")
    assert one.rows == whole.rows == 1438
    assert one.facts("label").columns == whole.facts("label").columns


@pytest.mark.parametrize("place", ["tandem/datasets/nothing/here", "tandem-no-such-bucket/x"])
def test_nothing_there(s3_env: Seaweed, place: str) -> None:
    with pytest.raises(TandemError, match=r"no dataset|listing") as error:
        Dataset.open("s3://" + place)
    if place.startswith("tandem/"):
        assert isinstance(error.value, NotFound)
    assert {"failed", "got", "allowed", "fix"} == set(error.value.parts())


def test_a_dataset_that_is_deleted_while_open_is_an_error(s3_env: Seaweed) -> None:
    _, held_out = samples.write_breast_cancer(s3_env.uri(Seaweed.BUCKET, "datasets/deleted"))
    dataset = Dataset.open(held_out)
    open_store(held_out).delete(["part-00000.parquet"])
    with pytest.raises(TandemError, match=r"part-00000\.parquet"):
        dataset.read_group(0, ["label"])


def test_a_store_that_fails_for_a_while_is_asked_again(
    s3_env: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, held_out = samples.write_breast_cancer(s3_env.uri(Seaweed.BUCKET, "datasets/faults"))
    whole = Dataset.open(held_out).read_group(0, ["label"])
    with FaultProxy(s3_env.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        # pyarrow itself asks three times.
        proxy.arm(Fault(Kind.STATUS, times=3))
        dataset = Dataset.open(held_out, cache_bytes=0, patience=Patience(60))
        proxy.arm(Fault(Kind.SHORTEN, method="GET", at_byte=100))
        assert dataset.read_group(0, ["label"]) == whole
        assert proxy.counts == {Kind.STATUS: 3, Kind.SHORTEN: 1}
        proxy.arm(Fault(Kind.STATUS, status=403, times=None))
        with pytest.raises(StorageError, match="listing"):
            Dataset.open(held_out)  # what is refused isn't asked for again
        with pytest.raises(StorageError, match="reading"):
            dataset.read_group(0, ["label"])


def test_what_was_read_is_read_from_the_disk_with_the_store_gone(
    s3_env: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    train, _ = samples.write_digits(s3_env.uri(Seaweed.BUCKET, "datasets/digits"))
    with FaultProxy(s3_env.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        options = {"cache_bytes": 0, "disk_bytes": 10**7, "patience": IMPATIENT}
        first, second = Dataset.open(train, **options), Dataset.open(train, **options)
        columns = ["label", "image"]
        read = [first.read_group(n, columns) for n in range(len(first.row_groups))]
        with proxy.down():
            assert [second.read_group(n, columns) for n in range(len(read))] == read
            with pytest.raises(StorageError):
                second.read_group(0, ["label"])
