"""`python -m tests.bench.loading`: rows a second from Parquet to tensors, beside Ray Data and DataLoader.

What each reader does is said in `tests.bench.readers`. Each is a process that has read an epoch
before the clock starts; a round is whole epochs, the start of each included, for a second
at least. Ours shuffles always
(but for one line, which says so), as training does; of the peers only those called shuffled do.

All readers decode images by `cluster.images.decode`, so what makes it faster helps the peers as well.
What was tried for images and left out stands in `training.data.decoding`; for tables: scattering a row
group's column (1.6 ns a value) and gathering from a whole window's (1.3 ns) cost nearly the same, and
interleaving columns so that a row is one cache line costs as much as it saves once a batch must be turned
back into columns. Reading takes the most: 70 ms of a core for a million rows of 17 columns.

    python -m tests.bench.loading [--pairs 5] [--rows 1000000] [--images 4096]
        [--only tables,images,s3,seek] [--batches 256,4096]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.images import SIDE, write_images
from tests.bench.machine import REPO, distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.seaweed import Seaweed

COLUMNS = 16
GROUP_ROWS = 62_500
FILES = 4
CORES = 2
SEEKS = 20
SEEK_AT_MOST_S = 1.0
ENDS_WITHIN_S = 120


def write_table(folder: Path, rows: int) -> str:
    """`rows` rows of 16 float32 columns and an integer label, in four files; gives the folder."""
    rng = np.random.Generator(np.random.PCG64(0))
    folder.mkdir()
    per_file = rows // FILES
    for n in range(FILES):
        columns: dict[str, Any] = {
            f"x{i:02d}": rng.standard_normal(per_file, dtype=np.float32) for i in range(COLUMNS)
        }
        columns["label"] = rng.integers(0, 10, per_file)
        pq.write_table(pa.table(columns), folder / f"part-{n}.parquet", row_group_size=GROUP_ROWS)
    return str(folder)


class Reader:
    """A running `tests.bench.readers` process, warmed up."""

    def __init__(self, name: str, asked: dict[str, Any], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.readers", name, json.dumps(asked)],
            cwd=REPO,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def rows_per_s(self) -> float:
        """One round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer("rows_per_s"))

    def _answer(self, key: str) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)[key]
        raise RuntimeError(f"the reader ended with {self._process.wait(ENDS_WITHIN_S)}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Field:
    """One dataset in one place, and what is compared on it."""

    name: str
    asked: dict[str, Any]
    batches_rows: tuple[int, ...]
    peers: tuple[str, ...]
    environment: dict[str, str]

    def compare(self, pairs: int) -> Iterator[Comparison]:
        """Each batch size, each peer."""
        for batch_rows in self.batches_rows:
            asked = {**self.asked, "batch": batch_rows}
            figure = f"rows/s, {self.name}, batch {batch_rows}"
            with Reader("tandem", asked, self.environment) as ours:
                for name in self.peers:
                    with Reader(name, asked, self.environment) as peer:
                        yield _compared(figure, "tandem", ours, name, peer, pairs)
            if "loader-streaming" in self.peers and not self.asked.get("images"):
                with (
                    Reader("tandem-in-order", asked, self.environment) as ours,
                    Reader("loader-streaming", asked, self.environment) as peer,
                ):
                    yield _compared(figure, "tandem, no shuffle", ours, "loader-streaming", peer, pairs)


def _compared(figure: str, our_name: str, ours: Reader, name: str, peer: Reader, pairs: int) -> Comparison:
    values = tuple(in_turn(ours.rows_per_s, peer.rows_per_s, pairs))
    return Comparison(figure, our_name, name, values, aim=1.0)


@contextmanager
def on_s3(folders: dict[str, Path]) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """A real S3 server that holds the folders: their URIs, and the environment to read them with."""
    with Seaweed() as server:
        before = {name: os.environ.get(name) for name in server.env}
        os.environ.update(server.env)
        try:
            for name, folder in folders.items():
                store = open_store(server.uri(Seaweed.BUCKET, name))
                for path in sorted(folder.iterdir()):
                    store.put(path.name, path)
            yield {name: server.uri(Seaweed.BUCKET, name) for name in folders}, server.env
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def seek(table: str) -> Measure:
    """Seconds from a position, anywhere in two epochs, to the batch that stands there; dataset open."""
    from training.data.dataset import Dataset
    from training.data.loader import Loader
    from training.tasks import build_task

    dataset = Dataset.open(table, cache_bytes=0)
    task = build_task("tabular-classification", dataset.facts("label"), {})
    options = {"global_batch_size": 256, "rank": 0, "world_size": 1, "epochs": 2}
    found_s = []
    for cursor in np.random.default_rng(0).integers(0, 2 * dataset.rows, SEEKS).tolist():
        started_s = time.monotonic()
        plan = dataset.plan(0)
        with Loader(dataset, plan, task, cursor=cursor, **options) as batches:  # type: ignore[arg-type]
            batch = next(batches)
            found_s.append(time.monotonic() - started_s)
        assert batch.cursor == cursor
    return Measure(f"s to seek any position of {dataset.rows:,} rows", tuple(found_s), at_most=SEEK_AT_MOST_S)


def main() -> int:
    chosen = asked(
        __doc__,
        rows=(int, 1_000_000, "of the table"),
        images=(int, 4096, "how many"),
        only=(str, "tables,images,s3,seek", "some of the parts"),
        batches=(str, "256,4096", "rows of a table's batch"),
    )
    parts = chosen.only.split(",")
    use_cores(CORES)
    versions = {
        "ours": distributions("tandem-ray", "pyarrow", "numpy"),
        "peers": distributions("ray", "torch"),
    }
    report = Report("Loading: Parquet to torch tensors", machine_facts(), versions)
    report.notes += [
        f"tables: {chosen.rows:,} rows of {COLUMNS} float32 and a label; images: {chosen.images:,} PNG of"
        f" {SIDE} x {SIDE}; {CORES} cores; what each reader does: tests/bench/readers.py",
        "tandem shuffles within 64 MiB and keeps one order for every world size; loader-shuffled holds the"
        " whole table in memory; ray-shuffled shuffles within 16 batches; the others don't shuffle",
    ]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        table = write_table(folder / "table", chosen.rows)
        pictures = str(write_images(folder / "images", chosen.images, seed=0))
        of_tables = {"data": table}
        batches = tuple(int(rows) for rows in chosen.batches.split(","))
        of_images = {"data": pictures, "images": True, "side": SIDE, "channels": 1}
        every = ("ray", "ray-shuffled", "loader-shuffled", "loader-streaming")
        fields = []
        if "tables" in parts:
            fields.append(Field("tables", of_tables, batches, every, {}))
        if "images" in parts:
            fields.append(Field("images", of_images, (256,), every, {}))
        if "s3" in parts:
            uris, env = stack.enter_context(on_s3({"table": Path(table), "images": Path(pictures)}))
            cache = {**env, "TANDEM_CACHE_DIR": str(folder / "cache")}
            from_s3, peers = {**of_tables, "data": uris["table"]}, ("ray", "loader-streaming")
            kept = {**from_s3, "disk_bytes": 2**30}
            fields.append(Field("tables from S3", from_s3, (4096,), peers, env))
            fields.append(Field("tables from S3, ours kept on disk", kept, (4096,), ("ray",), cache))
            pictures_s3 = {**of_images, "data": uris["images"]}
            fields.append(Field("images from S3", pictures_s3, (256,), peers, env))
        for field in fields:
            report.comparisons += field.compare(chosen.pairs)
        if "seek" in parts:
            report.measures.append(seek(table))
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
