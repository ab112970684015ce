"""The loader: every row once along the committed line, equal steps for all workers, clean ends."""

import hashlib
import io
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster import images
from cluster.errors import BadInput, StorageError
from cluster.signature import ImageEncoding, Signature, Tensor
from training.data import dataset as dataset_module
from training.data import pixels
from training.data.dataset import Dataset
from training.data.loader import HostBatch, Loader
from training.data.plan import Plan
from training.task import TARGET, Arrays, NoOptions, Task, Tensors

ROWS = 103


class Table(Task):
    """Takes a number, a word and an image; learns nothing."""

    def build_model(self) -> torch.nn.Module:
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        raise NotImplementedError

    def signature(self) -> Signature:
        image = ImageEncoding(height=2, width=2, channels=1)
        return Signature(
            task="test",
            inputs=(
                Tensor(name="x", dtype="FP32", shape=(-1,)),
                Tensor(name="word", dtype="BYTES", shape=(-1,)),
                Tensor(name="image", dtype="UINT8", shape=(-1, 2, 2, 1), encoding=image),
            ),
            outputs=(Tensor(name="y", dtype="FP32", shape=(-1,)),),
        )

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        return {"word": ("w0", "w1", "w2")}

    def metrics(self, outputs: Arrays, target: np.ndarray) -> dict[str, float]:
        raise NotImplementedError


class Noisy(Table):
    def augment(self, arrays: Arrays, rng: np.random.Generator) -> Arrays:
        return arrays | {"x": arrays["x"] + rng.random(arrays["x"].shape, dtype=np.float32)}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, **changes: list) -> str:
    ids = np.arange(ROWS)
    columns = {
        "x": ids.astype(float),
        "word": [f"w{i % 4}" for i in ids],
        "image": [png(i) for i in ids],
        "unused": ["never read"] * ROWS,
        "label": ids % 3,
    }
    pq.write_table(pa.table(columns | changes), folder / "a.parquet", row_group_size=10)
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("tandem-")}
    yield
    left = {thread for thread in threading.enumerate() if thread.name.startswith("tandem-")} - before
    assert not left


def plan_of(dataset: Dataset, window_groups: int = 3) -> Plan:
    return Plan(7, dataset.fingerprint, tuple(g.rows for g in dataset.row_groups), window_groups)


def run(
    dataset: Dataset,
    task: type[Table] = Table,
    plan: Plan | None = None,
    steps: int | None = None,
    **options,
) -> list[HostBatch]:
    settings = {"global_batch_size": 16, "rank": 0, "world_size": 1, "cursor": 0, "epochs": 1} | options
    with Loader(
        dataset, plan or plan_of(dataset), task(dataset.facts("label"), NoOptions()), **settings
    ) as it:
        return list(islice(it, steps))


def test_batches_hold_the_rows_of_the_plan(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    batches = run(dataset, epochs=2)
    assert [b.global_rows for b in batches] == [16] * 6 + [7] + [16] * 6 + [7]
    assert [b.cursor for b in batches] == [0, 16, 32, 48, 64, 80, 96, 103, 119, 135, 151, 167, 183, 199]
    assert all(a.next_cursor == b.cursor for a, b in pairwise(batches))
    encoding = ImageEncoding(height=2, width=2, channels=1)
    for batch in batches:
        start = batch.cursor % ROWS
        ids = plan.row_ids(batch.epoch, start, start + batch.global_rows)
        assert batch.row_ids.tolist() == ids.tolist()
        assert set(batch.arrays) == {"x", "word", "image", TARGET}
        np.testing.assert_array_equal(batch.arrays["x"], ids.astype(np.float32))
        np.testing.assert_array_equal(batch.arrays["word"], np.where(ids % 4 == 3, 0, ids % 4 + 1))
        np.testing.assert_array_equal(batch.arrays[TARGET], ids % 3)
        np.testing.assert_array_equal(
            batch.arrays["image"], np.stack([images.decode(png(i), encoding) for i in ids])
        )
        assert batch.weight.dtype == np.float32
        assert batch.weight.all()
        for array in batch.arrays.values():
            assert array.flags.writeable
            assert array.flags.c_contiguous


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_through_resizes_every_row_comes_exactly_once_an_epoch(dataset: Dataset, data: st.DataObject) -> None:
    plan = plan_of(dataset, data.draw(st.integers(1, 12)))
    epochs, cursor = 2, 0
    seen: list[list[int]] = [[], []]
    while cursor < epochs * ROWS:
        world = data.draw(st.integers(1, 4))
        options = {
            "steps": data.draw(st.integers(1, 12)),
            "plan": plan,
            "global_batch_size": data.draw(st.integers(5, 40)),
            "world_size": world,
            "cursor": cursor,
            "epochs": epochs,
        }
        ranks = [run(dataset, rank=rank, **options) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        for step in zip(*ranks, strict=True):
            assert len({(b.cursor, b.next_cursor, b.epoch, b.global_rows, len(b.weight)) for b in step}) == 1
            assert len(step[0].weight) == -(-step[0].global_rows // world)
            for batch in step:
                real = batch.weight > 0
                assert (batch.row_ids[~real] == -1).all()
                np.testing.assert_array_equal(batch.arrays["x"][real], batch.row_ids[real])
                assert np.isfinite(batch.arrays["x"]).all()
                seen[batch.epoch] += batch.row_ids[real].tolist()
            cursor = step[0].next_cursor
    for epoch, ids in enumerate(seen):
        assert ids == plan.row_ids(epoch, 0, ROWS).tolist()


def test_a_worker_with_nothing_to_do_still_takes_every_step(dataset: Dataset) -> None:
    last = [run(dataset, rank=rank, world_size=9, cursor=96)[0] for rank in range(9)]
    assert [int(batch.weight.sum()) for batch in last] == [1] * 7 + [0, 0]
    assert all(len(batch.arrays["x"]) == 1 for batch in last)
    assert last[8].row_ids.tolist() == [-1]


@pytest.mark.parametrize(
    "options", [{"threads": 1}, {"threads": 5}, {"prefetch_batches": 0}, {"prefetch_batches": 9}]
)
def test_threads_and_prefetching_change_nothing(dataset: Dataset, options: dict) -> None:
    for a, b in zip(run(dataset, Noisy), run(dataset, Noisy, **options), strict=True):
        assert a.row_ids.tolist() == b.row_ids.tolist()
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name])


def test_augmentation_is_a_function_of_the_row_alone_not_of_workers_or_batches(dataset: Dataset) -> None:
    def augmented(**options) -> dict[tuple[int, int], float]:
        world = options.get("world_size", 1)
        return {
            (batch.epoch, int(row)): float(x)
            for rank in range(world)
            for batch in run(dataset, Noisy, rank=rank, epochs=2, **options)
            for row, x in zip(batch.row_ids, batch.arrays["x"], strict=True)
            if row >= 0
        }

    alone = augmented()
    assert len(alone) == 2 * ROWS
    noise = np.array([x - row for (_, row), x in alone.items()])
    assert len(set(noise.round(3))) > 100
    assert alone == augmented(world_size=3, global_batch_size=10)


def test_each_row_has_the_generator_that_it_always_had(dataset: Dataset) -> None:
    """A run that began with an earlier release goes on with the same augmentation."""
    plan = plan_of(dataset)
    text = f"tandem augment 1\n{plan.seed}\n{plan.fingerprint}"
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")
    plain, noisy = run(dataset), run(dataset, Noisy)
    for left, right in zip(plain, noisy, strict=True):
        for place, row in enumerate(left.arrays["x"]):
            counter = np.array([0, 0, left.cursor + place, 0], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
            assert right.arrays["x"][place] == row + rng.random((1, *row.shape), dtype=np.float32)[0]


def test_only_the_columns_that_are_needed_are_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = dataset_module.read_group
    monkeypatch.setattr(dataset_module, "read_group", lambda *args: asked.append(args[3]) or real(*args))
    fresh = Dataset.open(dataset.uri, cache_bytes=0)
    task = Table(dataset.facts("label"), NoOptions())
    with Loader(
        fresh, plan_of(fresh), task, global_batch_size=5, rank=0, world_size=1, cursor=0, epochs=1
    ) as it:
        list(it)
    assert all(columns == ["x", "word", "image", "label"] for columns in asked)
    assert len(asked) == len(dataset.row_groups)  # each row group once an epoch, with nothing cached


def test_leaving_early_ends_the_threads(dataset: Dataset) -> None:
    task = Table(dataset.facts("label"), NoOptions())
    options = {"global_batch_size": 4, "rank": 0, "world_size": 1, "cursor": 0, "epochs": 1000}
    with Loader(dataset, plan_of(dataset), task, **options) as batches:
        next(batches)
    assert list(batches) == []
    batches.close()
    never_used = Loader(dataset, plan_of(dataset), task, **options)
    never_used.close()
    with pytest.raises(KeyboardInterrupt), Loader(dataset, plan_of(dataset), task, **options) as batches:
        raise KeyboardInterrupt


def test_a_bad_row_surfaces_at_its_batch_with_its_number(tmp_path: Path) -> None:
    files = [png(i) for i in range(ROWS)]
    good = Dataset.open(write(tmp_path))
    facts = good.facts("label")
    files[50] = b"broken"
    bad = Dataset.open(write(tmp_path, image=files))
    plan = Plan(0, bad.fingerprint, tuple(g.rows for g in bad.row_groups), shuffle=False)
    task = Table(facts, NoOptions())
    with Loader(bad, plan, task, global_batch_size=20, rank=0, world_size=1, cursor=0, epochs=1) as batches:
        assert len(list(islice(batches, 2))) == 2
        place = "row 0 of row group 5 of 'a.parquet' in .*"
        with pytest.raises(BadInput, match=f"row 50 of 'image': .*{place}"):
            next(batches)
        assert list(batches) == []


def test_processes_that_decode_change_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run(dataset, epochs=2)
    monkeypatch.setattr(pixels, "_DECODERS_PAY_FROM_ROWS", 0)
    monkeypatch.setattr(pixels, "_SMALL_IMAGES_PER_JOB", 3)
    task = Table(dataset.facts("label"), NoOptions())
    options = {"global_batch_size": 16, "rank": 0, "world_size": 1, "cursor": 0, "epochs": 2}
    with Loader(dataset, plan_of(dataset), task, **options) as batches:
        processes = batches._pixels.processes
        assert processes is not None
        processes.wait_until_ready()
        elsewhere = list(batches)
    assert len(elsewhere) == len(here)
    for left, right in zip(here, elsewhere, strict=True):
        assert left.cursor == right.cursor
        np.testing.assert_array_equal(left.row_ids, right.row_ids)
        for name, values in left.arrays.items():
            np.testing.assert_array_equal(values, right.arrays[name])


def test_a_dataset_that_goes_away_is_an_error_not_a_hang(tmp_path: Path) -> None:
    vanishing = Dataset.open(write(tmp_path), cache_bytes=0)
    task = Table(vanishing.facts("label"), NoOptions())
    reopened = Dataset.open(vanishing.uri, cache_bytes=0)
    (tmp_path / "a.parquet").unlink()
    options = {"global_batch_size": 20, "rank": 0, "world_size": 1, "cursor": 0, "epochs": 1}
    with Loader(reopened, plan_of(reopened), task, **options) as batches, pytest.raises(StorageError):
        next(batches)
