"""The only file that speaks Ray Train: it places the workers, and Ray rebuilds them when one fails.

Checkpoints don't travel through `ray.train.report`: a worker that starts reads the newest whole
manifest of its run (training.worker), so Ray's own bookkeeping can neither lose one nor end the run
over one. What does travel through Ray is small: progress, and the error that makes retrying
pointless, both through one actor.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import traceback
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.errors import RunFailed, TandemError, shown
from cluster.local import find
from cluster.runs import RunResult
from training.facts import DatasetFacts
from training.finish import finish_run
from training.progress import Progress, Show
from training.recipe import Recipe
from training.worker import Outcome, run_worker

POLL_S = 0.25
ACTOR_TIMEOUT_S = 30
_BUGS = (
    TypeError,
    ValueError,
    AttributeError,
    NameError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
)
"""What code raises for reasons of its own; a restart meets it again."""


class Board:
    """What workers tell the driver."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._latest: Progress | None = None
        self._outcome: Outcome | None = None
        self._fatal: TandemError | None = None
        self._failures: set[tuple[int, str]] = set()

    def report(self, progress: Progress) -> None:
        if progress.note:
            self._notes.append(progress.note)
        self._latest = progress

    def end(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def outcome(self) -> Outcome | None:
        return self._outcome

    def give_up(self, error: TandemError) -> None:
        self._fatal = self._fatal or error

    def failed(self, rank: int, error: TandemError) -> None:
        """A worker failed in a way that a restart may mend; the same way twice, and it won't."""
        if (rank, error.got) in self._failures:
            self.give_up(error)
        self._failures.add((rank, error.got))
        self._notes.append(f"worker {rank} failed, it is started again: {error.got}")

    def fatal(self) -> TandemError | None:
        return self._fatal

    def news(self) -> tuple[list[str], Progress | None]:
        """Notes and the latest progress since the last call."""
        notes, self._notes = self._notes, []
        latest, self._latest = self._latest, None
        return notes, latest


class _Trainer(TorchTrainer):  # type: ignore[misc] # Ray's own types are not followed
    """Leaves Ctrl-C alone. Ray's handler ends the process without a word, with exit code 1; an ordinary
    KeyboardInterrupt unwinds, and the controller, which belongs to this driver, ends with it."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Registers none."""


def _new_board() -> Any:
    return ray.remote(num_cpus=0)(Board).remote()


def fit(recipe: Recipe, run_name: str, facts: DatasetFacts, show: Show, epoch: int = 0) -> Outcome:
    """Train on the connected cluster until the last step is committed.

    Raises:
        TandemError: one that retrying can't mend, from a worker.
        RunFailed: workers failed more often than the recipe allows.
    """
    board = _new_board()
    workers = recipe.workers
    # Below a local Ray's own folder, so that it goes with that Ray even if this process is killed.
    local = find(ray.get_runtime_context().gcs_address)
    place = local.record.temp_dir if local else None
    with tempfile.TemporaryDirectory(prefix="tandem-train-", dir=place) as folder:
        trainer = _Trainer(
            _on_worker,
            train_loop_config={
                "recipe": recipe.model_dump(mode="json"),
                "run": run_name,
                "facts": facts.model_dump(mode="json"),
                "board": board,
            },
            scaling_config=ScalingConfig(
                num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),
                use_gpu=workers.gpus > 0,
                resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
            ),
            # The name is the folder's: Ray silently resumes a run name that it has seen before.
            run_config=RunConfig(
                name=run_name,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=recipe.max_failures),
            ),
        )
        with _Watch(board, show):
            try:
                trainer.fit()
            except Exception as error:  # noqa: BLE001 - Ray wraps whatever a worker raised
                failure: Exception | None = error
            else:
                failure = None
        fatal = ray.get(board.fatal.remote(), timeout=ACTOR_TIMEOUT_S)
        if fatal is not None:
            raise fatal
        if failure is not None:
            raise RunFailed(
                f"run '{run_name}' failed more often than its recipe allows",
                got=shown(str(failure).strip().rsplit("\n", 1)[-1]),
                allowed=f"max_failures: {recipe.max_failures}",
                fix=f"see tandem logs {run_name}; the same command with run={run_name} continues it",
            ) from failure
        outcome: Outcome | None = ray.get(board.outcome.remote(), timeout=ACTOR_TIMEOUT_S)
        assert outcome is not None, "rank 0 ends by telling the board"
        return outcome


def finish(recipe: Recipe, run_name: str, outcome: Outcome, show: Show) -> RunResult:
    """Export, evaluate, judge and register, in one Ray task with the resources of one worker."""
    board = _new_board()
    with _Watch(board, show):
        try:
            finish_task: Any = ray.remote(num_cpus=recipe.workers.cpus, max_retries=1)(_finish_task)
            task = finish_task.remote(recipe.model_dump(mode="json"), run_name, outcome.samples_per_s, board)
            result: RunResult = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise _told(error.cause, "export or evaluation") from error
    return result


def _on_worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    board = config["board"]
    if ray.get(board.fatal.remote(), timeout=ACTOR_TIMEOUT_S) is not None:
        return  # restarted by Ray after an error that a restart can't mend
    context = ray.train.get_context()
    try:
        outcome = run_worker(
            Recipe.model_validate(config["recipe"]),
            config["run"],
            DatasetFacts.model_validate(config["facts"]),
            report=board.report.remote,
        )
    except Exception as error:
        told = _told(error, "training")
        if isinstance(error, _BUGS) or (isinstance(error, TandemError) and not error.retryable):
            ray.get(board.give_up.remote(told), timeout=ACTOR_TIMEOUT_S)
            if context.get_world_size() == 1:
                return  # no other worker waits for this one, so Ray need not restart anything
        else:
            ray.get(board.failed.remote(context.get_world_rank(), told), timeout=ACTOR_TIMEOUT_S)
        raise
    if context.get_world_rank() == 0:
        ray.get(board.end.remote(outcome), timeout=ACTOR_TIMEOUT_S)


def _finish_task(recipe: dict[str, Any], run_name: str, samples_per_s: float, board: Any) -> RunResult:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    return finish_run(
        Recipe.model_validate(recipe), run_name, samples_per_s=samples_per_s, show=board.report.remote
    )


def _told(error: BaseException, doing: str) -> TandemError:
    """An error that a person can act on: itself, or for what any code may raise, what and where."""
    if isinstance(error, TandemError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return RunFailed(
        f"{doing} failed in the task's own code, or in what it called",
        got=shown(f"{type(error).__name__}: {error}") + where,
        fix="correct it, then run the same command again; with --run NAME a run goes on where it was",
    )


class _Watch:
    """Shows what the board has, from a thread, because `fit` needs the main one for signals."""

    def __init__(self, board: Any, show: Show) -> None:
        self._board = board
        self._show = show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(ACTOR_TIMEOUT_S)

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            self._once()
        self._once()

    def _once(self) -> None:
        try:
            notes, latest = ray.get(self._board.news.remote(), timeout=ACTOR_TIMEOUT_S)
        except ray.exceptions.RayError:
            return  # the cluster is going away; `fit` says so itself
        for note in notes if latest is None else notes[:-1] if latest.note else notes:
            self._show(Progress("training", note=note))
        if latest is not None:
            self._show(latest)
