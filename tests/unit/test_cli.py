"""The command line on a store in a folder: tables, JSON, exit codes, errors in four parts."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.cli import app, main
from cluster.events import EventWriter
from cluster.registry import Registry
from cluster.runs import Run, RunRecord, RunResult, new_run_name
from cluster.storage import Store, open_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with a committed run, a refused one, one that has not ended, and a model of two versions."""
    uri = str(tmp_path / "store")
    monkeypatch.setenv("TANDEM_STORE", uri)
    store = open_store(uri)
    for name, gate in (("done", "passed"), ("refused", "failed"), ("going", None)):
        run = Run(store, name)
        run.start(
            RunRecord(
                run=name,
                model="digits",
                recipe={"model": "digits"},
                facts={},
                created_at=datetime(2026, 1, 2, tzinfo=UTC),
                release="0",
            )
        )
        if gate is not None:
            run.finish(result(name, gate, store))
    Run(store, "going").checkpoints().commit(1, {"w": b"1"}, {"step": 17})
    registry = Registry(store)
    for n in (1, 2):
        registry.register(
            "digits",
            manifest_key="k",
            manifest=b"{}",
            run="done",
            metrics={"accuracy": 0.9 + n / 100},
            why="gate",
        )
        registry.promote("digits", "live", n, why=f"reason {n}")
    return store


def result(run: str, gate: str, store: Store) -> RunResult:
    return RunResult(
        run=run,
        model="digits",
        version=1 if gate == "passed" else None,
        store=store.uri,
        metrics={"accuracy": 0.97},
        steps=42,
        samples_per_s=123.4,
        gate=gate,
    )


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict]:
    assert main([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_runs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run["run"]: run for run in told(capsys, "runs")}
    assert {name: (run["state"], run["step"]) for name, run in runs.items()} == {
        "done": ("committed", 42),
        "refused": ("gate refused", 42),
        "going": ("not finished", 17),
    }
    assert runs["done"]["version"] == 1
    assert main(["runs"]) == 0
    table = capsys.readouterr().out
    assert "gate refused" in table
    assert "accuracy 0.97" in table


def test_a_run(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = told(capsys, "runs", "show", "done")
    assert run["recipe"] == {"model": "digits"}
    assert main(["runs", "show", "done"]) == 0
    assert "committed" in capsys.readouterr().out
    assert main(["runs", "show", "never"]) == 2
    assert "no run 'never'" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["run.json", "result.json"])
def test_a_damaged_run_is_named_and_hides_no_other(
    store: Store, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    store.put(f"runs/done/{file}", b'{"run": "done", ')
    states = {run["run"]: run["state"] for run in told(capsys, "runs")}
    assert states == {"done": "damaged", "refused": "gate refused", "going": "not finished"}
    assert main(["runs"]) == 0
    assert "damaged" in capsys.readouterr().out
    for argv in (["runs", "show", "done"], ["logs", "done"]):
        assert main(argv) == 1
        told_parts = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
        assert told_parts == ["error", "got", "allowed", "fix"]


def test_logs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    events = EventWriter(store, "runs/done", "a")
    events.write("step", step=1, loss=0.5)
    events.flush()
    events.write("step", step=2, loss=0.25)
    events.flush()
    assert [event["step"] for event in told(capsys, "logs", "done")] == [1, 2]
    assert main(["logs", "done", "--follow"]) == 0
    assert "step=2  loss=0.25" in capsys.readouterr().out
    assert main(["logs", "never"]) == 2


def test_models(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "models") == [{"model": "digits", "versions": 2, "aliases": {"live": 2}}]
    (model,) = told(capsys, "models", "show", "digits")
    assert [version["metrics"]["accuracy"] for version in model["versions"]] == [0.91, 0.92]
    assert [entry["action"] for entry in model["history"]] == ["register", "promote"] * 2
    assert main(["models", "show", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "promote live -> 2" in shown
    assert "reason 2" in shown


def test_promote_and_rollback(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (moved,) = told(capsys, "models", "rollback", "digits", "--why", "bad")
    assert moved == {"model": "digits", "alias": "live", "version": 1, "entry": 5}
    (moved,) = told(capsys, "models", "promote", "digits", "2", "--alias", "canary", "--why", "try")
    assert moved["alias"] == "canary"
    assert Registry(store).history("digits")[-1].why == "try"
    assert main(["models", "promote", "digits", "9"]) == 2
    assert main(["models", "rollback", "digits"]) == 2
    assert main(["models", "promote", "digits", "two"]) == 2


def test_an_error_is_four_aligned_parts_on_stderr(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "promote", "digits", "9"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error:   model 'digits' has no version 9",
        "allowed: 1 to 2",
        "fix:     list them: tandem models show digits",
    ]


def test_the_traceback_is_shown_when_asked_for(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_DEBUG", "1")
    assert main(["models", "show", "never"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_nobody_foresaw_is_a_fault_of_ours(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Registry, "models", broken)
    assert main(["models"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error:   ZeroDivisionError: oh" in err


def test_interrupting_is_quiet(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Registry, "models", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr() == ("", "")


def test_being_told_to_stop_is_quiet(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Registry, "models", lambda _: signal.raise_signal(signal.SIGTERM))
    assert main(["models"]) == 143
    assert capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["train"],
        ["models", "promote", "digits"],
        ["runs", "--nonsense"],
        ["serve", "digits@live", "--port", "70000"],
        ["train", "missing.yaml"],
        ["train", "missing.yaml", "no-override"],
        ["serve", "Bad Name@live"],
        ["serve", "missing.yaml"],
        ["k8s", "render", "missing.yaml"],
        ["data", "import", "csv", "missing.csv", "out", "--label", "y"],
        ["data", "import", "images", "missing", "out"],
        ["submit", "missing.yaml", "--address", "http://127.0.0.1:1"],
        ["models", "--store", "s3://key:secret@bucket"],
    ],
)
def test_bad_input_ends_with_2(
    argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert "Traceback" not in err
    assert "secret" not in err


def test_looking_makes_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere"
    for command in (["runs"], ["models"], ["models", "show", "m"], ["logs", "r"]):
        assert main([*command, "--store", str(nowhere)]) == 2
        assert "there is no store" in capsys.readouterr().err
    assert not nowhere.exists()


def test_nothing_is_running_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    assert main(["status", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": []}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, task: tabular-classification, data: {train: t, eval: e}, store: s}")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", str(recipe)]) == 2
    assert "no cluster to send the job to" in capsys.readouterr().err


@pytest.mark.parametrize(("gate", "code"), [("passed", 0), ("failed", 3)])
def test_train_prints_its_result_last_and_tells_the_gate_by_its_exit_code(
    store: Store,
    gate: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import training.run

    asked = {}

    def train(
        recipe, *, address, show, take_over
    ):  # what it does is tested where it is; here, what is asked of it
        asked.update(run=recipe.run, workers=recipe.workers.max, address=address)
        return result(recipe.run, gate, store)

    monkeypatch.setattr(training.run, "train", train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, task: tabular-classification, data: {train: t, eval: e}, store: s}")
    argv = ["train", str(recipe), "workers.max=2", "--run", "2026", "--address", "h:1", "--json"]
    assert main(argv) == code
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["gate"] == gate
    assert {"run", "version", "store", "metrics", "steps", "samples_per_s", "gate"} <= set(line)
    assert asked == {"run": "2026", "workers": 2, "address": "h:1"}


def test_every_command_that_prints_a_result_takes_json() -> None:
    import typer

    def commands(group, path=()):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                if command.invoke_without_command:
                    yield (*path, name), command
                yield from commands(command, (*path, name))
            else:
                yield (*path, name), command

    found = dict(commands(typer.main.get_command(app)))
    assert len(found) >= 15
    for path, command in found.items():
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, path


def test_the_installed_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "version", "--json"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert {"tandem-ray", "ray", "torch", "python"} <= set(json.loads(done.stdout))


def test_names_of_new_runs_are_names() -> None:
    from cluster.names import check_name

    for model in ("m", "x" * 63, "a.b_c-d"):
        assert check_name(new_run_name(model)).startswith(model[:36])
    assert new_run_name("m") != new_run_name("m")
