"""A run's summary from its events, whole, partly missing or damaged; and how it is shown."""

import json
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.cli import main
from cluster.clock import SYSTEM_CLOCK
from cluster.errors import StorageError
from cluster.events import EventWriter, read_events
from cluster.runs import Run, RunRecord, RunResult
from cluster.storage import Store, memory_store, open_store
from cluster.summary import CURVE_POINTS, Summary, read_summary, summarise, write_summary

START = datetime(2026, 1, 2, tzinfo=UTC)


def new_run(store: Store, cost: dict[str, Any] | None = None) -> Run:
    run = Run(store, "r")
    run.start(
        RunRecord(
            run="r",
            model="digits",
            recipe={
                "model": "digits",
                "optimization": {"global_batch_size": 100, "epochs": 2},
                "cost": cost,
            },
            facts={"rows": 950},
            created_at=START,
            release="0",
        )
    )
    return run


def event(at_s: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"at": (START + timedelta(seconds=at_s)).isoformat(), "event": name, **fields}


def put(run: Run, segment: str, *events: dict[str, Any]) -> None:
    lines = b"".join(orjson.dumps(event) + b"\n" for event in events)
    run.store.put(f"{run.prefix}/events/{segment}.jsonl", lines)


def step(at_s: float, number: int, loss: float, rate: float = 1000.0) -> dict[str, Any]:
    return event(at_s, "step", step=number, epoch=number // 10, loss=loss, samples_per_s=rate)


def eventful(run: Run) -> None:
    """Two workers; one is killed, one batch ruins the weights, checkpoints are lost and found damaged."""
    put(
        run,
        "coordinator-00001",
        event(0, "generation-started", generation=1, world=2, source="fresh", step=0),
        event(20, "member-lost", member="m1", rank=1, how="killed by signal 9", step=5),
        event(21.5, "generation-started", generation=2, world=2, source="memory", step=5),
        event(40, "resize", **{"from": 2, "to": 1}, why="asked", step=8),
        event(40, "generation-started", generation=3, world=1, source="memory", step=8),
    )
    put(
        run,
        "a-rank0-00001",
        event(0, "model-flops", flops_per_row=1e6, device="H100", peak_flops_per_s=1e10),
        event(4.5, "first-step", step=1),
        step(5, 1, 2.0),
        step(10, 2, 1.5),
        step(11, 3, 9.0),
        event(12, "checkpoint-committed", checkpoint=1, step=2, cursor=200),
        event(13, "checkpoint-failed", why="the store is away"),
        event(29, "first-step", step=3),
        step(30, 3, 1.0),
        event(31, "batch-skipped", step=4, cursor=400),
        event(32, "rolled-back", why="the loss is not finite", step=4, to_step=2, checkpoint=1),
        step(40, 5, 0.5),
        event(40, "account", member="m0", account="x", seconds={"compute": 30, "data": 6, "save": 4}),
    )
    put(
        run,
        "a-rank1-00001",
        event(19, "account", member="m1", account="y", seconds={"compute": 19}),
        event(31, "batch-skipped", step=4, cursor=400),
        event(32.1, "rolled-back", why="the loss is not finite", step=4, to_step=2, checkpoint=1),
        event(40, "account", member="m2", account="z", seconds={"compute": 18, "restart": 1}),
    )


def test_the_summary_of_an_eventful_run() -> None:
    run = new_run(memory_store(), {"per_worker_hour": 36.0, "currency": "EUR"})
    eventful(run)
    summary = summarise(run)
    assert (summary.step, summary.total_steps, summary.epoch) == (5, 20, 0)
    assert summary.loss == 0.5
    assert summary.curve == ((1, 2.0), (2, 1.5), (3, 1.0), (5, 0.5))
    assert summary.first_step_s == 4.5
    assert summary.samples_per_s == 1000
    assert summary.workers == 1
    assert summary.mfu == pytest.approx(1000 * 1e6 / 1e10)
    assert summary.time.worker_s["compute"] == 30 + 19 + 18
    assert summary.time.worker_s["restart"] == 1 + 2
    assert summary.time.total_s == 2 * summary.time.wall_s == 80
    assert summary.time.data_wait == pytest.approx(6 / 77)
    assert summary.time.cost is not None
    assert sum(summary.time.cost.values()) == pytest.approx(80 * 36 / 3600)
    assert summary.checkpoints.model_dump() == {
        "committed": 1,
        "newest": 1,
        "newest_step": 2,
        "failed": 1,
        "passed_over": 0,
    }
    assert [(f.what, f.step, f.back_s) for f in summary.failures] == [
        ("member-lost", 5, 1.5),
        ("rolled-back", 4, None),
    ]
    assert summary.resizes == 1
    assert summary.skipped_steps == (4,)
    assert summary.given_up is None


def test_steps_repeated_from_an_older_checkpoint_are_redone() -> None:
    run = new_run(memory_store())
    put(
        run,
        "a-00001",
        event(0, "attempt-started", rank=0, world=2, source="fresh", step=0),
        *(step(n, n, 1.0) for n in range(1, 21)),
        event(20, "account", member="m0", account="x", seconds={"compute": 20}),
        event(20, "account", member="m1", account="y", seconds={"compute": 20}),
    )
    put(
        run,
        "b-00001",
        event(30, "attempt-started", rank=0, world=2, source="store", step=15, checkpoint=1),
        *(step(15 + n, n, 1.0) for n in range(16, 31)),
        event(45, "account", member="m0", account="z", seconds={"compute": 12, "data": 3}),
        event(45, "account", member="m1", account="w", seconds={"compute": 12, "data": 3}),
    )
    time = summarise(run).time
    assert time.worker_s["redone"] == 2 * 5  # steps 16 to 20, on two workers
    assert time.total_s == 70


def test_a_run_without_events() -> None:
    summary = summarise(new_run(memory_store()))
    assert (summary.step, summary.loss, summary.last_event_at, summary.curve) == (None, None, None, ())
    assert summary.time.goodput is None
    assert summary.time.cost is None


def test_a_run_that_gave_up_and_one_that_was_taken_up_again() -> None:
    run = new_run(memory_store())
    put(run, "c-00001", event(1, "gave-up", failed="run 'r' failed more often than its recipe allows"))
    assert summarise(run).given_up == "run 'r' failed more often than its recipe allows"
    put(run, "c-00002", event(2, "generation-started", generation=1, world=1))
    assert summarise(run).given_up is None


@pytest.mark.parametrize("seed", range(15))
def test_damaged_events_cost_only_themselves(seed: int) -> None:
    """Bytes are changed, cut off and left out, lines replaced by other JSON: there is always a summary."""
    run = new_run(memory_store())
    eventful(run)
    chance = random.Random(seed)
    other = [b"null", b"7", b"[]", b'{"event": 3}', b'{"event":"step","step":"x"}', b'{"event":"lent"}', b"{"]
    for key in run.store.keys(f"{run.prefix}/events"):
        data = bytearray(run.store.get(key))
        for _ in range(chance.randint(0, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        lines = bytes(data[: chance.randrange(len(data) // 2, len(data))]).split(b"\n")
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(other))
        run.store.put(key, b"\n".join(lines))
    summary = summarise(run)
    assert summary == Summary.model_validate_json(summary.model_dump_json())
    assert list(read_events(run.store, run.prefix))


def test_one_damaged_line_hides_no_other() -> None:
    run = new_run(memory_store())
    put(run, "a-00001", step(1, 1, 2.0), step(2, 2, 1.0))
    run.store.put(f"{run.prefix}/events/b-00001.jsonl", b'{"event": "st\n' + orjson.dumps(step(3, 3, 0.5)))
    assert summarise(run).step == 3
    assert summarise(run).unreadable_segments == 1
    (told,) = [e for e in read_events(run.store, run.prefix) if e["event"] == "unreadable"]
    assert told["lines"] == 1


def test_a_long_curve_is_thinned() -> None:
    run = new_run(memory_store())
    put(run, "a-00001", *(step(n, n, float(n)) for n in range(1, 3001)))
    curve = summarise(run).curve
    assert len(curve) <= CURVE_POINTS
    assert curve[0][1] < curve[1][1]
    assert curve[-1][0] == 3000


def test_an_attempt_leaves_a_summary_and_a_store_that_fails_costs_nothing_else() -> None:
    run = new_run(memory_store())
    assert read_summary(run) is None
    eventful(run)
    assert write_summary(run)
    assert read_summary(run) == summarise(run)
    run.store.put(f"{run.prefix}/summary.json", b"{")
    assert read_summary(run) is None


def test_a_store_that_fails_costs_only_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(memory_store())

    def fail(*_: object) -> None:
        raise StorageError("away")

    monkeypatch.setattr(run.store, "put", fail)
    assert not write_summary(run)


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TANDEM_STORE", str(tmp_path))
    run = new_run(open_store(str(tmp_path)), {"per_worker_hour": 36.0, "currency": "EUR"})
    eventful(run)
    return run


def test_show(shown: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shown.checkpoints().commit(1, {"w": b"1"}, {"step": 2})
    assert main(["runs", "show", "r"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    for expected in (
        "not finished, last event",
        "5 of 20 (25%), epoch 1",
        "10.0%",  # MFU
        "compute",
        "cost (EUR)",
        "0.8000",
        "killed by signal 9",
        "1.50 s",
        "1 committed; newest 1 at step 2; kept: 1; 1 given up",
        "1 batches, at steps 4",
        "*",
    ):
        assert expected in text, expected


def test_show_json(shown: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "r", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "not finished"
    assert facts["step"] == 5
    assert facts["summary"]["time"]["worker_s"]["compute"] == 67
    assert Summary.model_validate_json(json.dumps(facts["summary"])) == summarise(shown)


def test_states(shown: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> str:
        assert main(["runs", "show", "r", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["state"]

    writer = EventWriter(shown.store, shown.prefix, "now")
    writer.write("step", step=6, epoch=0, loss=0.25, samples_per_s=5.0)
    writer.flush()
    assert state() == "running"
    writer.write("gave-up", failed="enough")
    writer.flush()
    assert state() == "failed"
    assert main(["runs", "show", "r"]) == 0
    assert "enough" in capsys.readouterr().out
    shown.finish(
        RunResult(
            run="r",
            model="digits",
            version=3,
            store=shown.store.uri,
            metrics={"accuracy": 0.9},
            steps=20,
            samples_per_s=10.0,
            gate="passed",
        )
    )
    assert state() == "committed"


def test_a_run_whose_events_were_deleted_shows_what_its_last_attempt_left(
    shown: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(shown)
    shown.store.delete(shown.store.keys(f"{shown.prefix}/events"))
    assert main(["runs", "show", "r"]) == 0
    assert "5 of 20" in capsys.readouterr().out


def test_showing_a_run_needs_neither_torch_nor_ray(shown: Run) -> None:
    code = (
        "import sys; from cluster.cli import main; code = main(['runs', 'show', 'r']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'ray', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_writing_an_event_does_not_wait_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    store, may_go_on, asked = memory_store(), threading.Event(), threading.Event()
    real_put = store.put

    def slow_put(key: str, data: bytes) -> None:
        asked.set()
        may_go_on.wait(60)
        real_put(key, data)

    monkeypatch.setattr(store, "put", slow_put)

    class Clock:
        now_s = 0.0
        wall = staticmethod(SYSTEM_CLOCK.wall)

        def monotonic_s(self) -> float:
            Clock.now_s += 10.0
            return Clock.now_s

    writer = EventWriter(store, "runs/r", "a", Clock())  # type: ignore[arg-type]
    for number in range(5):
        writer.write("step", step=number)  # each one due
    assert asked.wait(60)
    writer.write("step", step=5)
    may_go_on.set()
    writer.flush()
    assert sorted(e["step"] for e in read_events(store, "runs/r")) == list(range(6))


def test_the_workers_say_how_many_steps_there_are() -> None:
    """What a step is depends on the method: a round of boosting is none of the recipe's batches."""
    run = new_run(memory_store())
    assert summarise(run).total_steps == 20
    put(run, "a", event(1, "attempt-started", rank=0, world=1, step=0, total_steps=300), step(2, 7, 0.5))
    assert summarise(run).total_steps == 300
