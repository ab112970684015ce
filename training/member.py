"""The life of one training process: it takes part in one generation of workers after another, as ordered.

A thread reads orders, another one says every second that the process lives; the main thread trains. When a
peer dies, the exchange with it fails, and this process says so and waits: its state stays in memory, for
the next generation. It ends when it is told to, or when whoever talks to it is gone.

Knows neither Ray nor who else is in the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import socket
import threading
import traceback
from dataclasses import asdict

import torch
import torch._dynamo  # what the first optimizer and DDP import: once here, rather than in every member
import torch.distributed as dist

from cluster.config import Frozen
from cluster.errors import Conflict, RunFailed, TandemError, shown
from training.control import Control
from training.crew.messages import (
    Beat,
    Ended,
    Failed,
    Hosting,
    Join,
    Joined,
    Leave,
    Part,
    Parted,
    Pause,
    Paused,
    Ready,
    Spec,
    Told,
    error_fields,
    parse_order,
    send,
)
from training.device import worker_device
from training.facts import DatasetFacts
from training.group import Bond, Group, host_store, reach_store
from training.progress import Progress
from training.recipe import Recipe
from training.worker import Worker

BEAT_EVERY_S = 1.0
_STORE_PHASES = ("restoring", "saving", "committing")
_PATIENCE_MARGIN_S = 60.0
_MISTAKES = (
    TypeError,
    ValueError,
    AttributeError,
    NameError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
)
"""What code raises for reasons of its own; another try meets it again."""


def live(channel: socket.socket, spec: Spec) -> None:
    """Obey orders until one says to leave, or the channel closes."""
    faulthandler.enable()
    _Member(channel, spec).live()


class _Member:
    def __init__(self, channel: socket.socket, spec: Spec) -> None:
        self._channel = channel
        self._spec = spec
        self._recipe = Recipe.model_validate(spec.recipe)
        self._sending = threading.Lock()
        self._joins: queue.Queue[Join | None] = queue.Queue()
        self._control = Control()
        self._generation = 0
        self._bond: Bond | None = None
        self._parted = 0
        """The newest generation that is known to be broken."""

    def live(self) -> None:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        threading.Thread(target=self._beat, name="beats", daemon=True).start()
        self._say(Ready(pid=os.getpid()))
        worker = self._early_worker()
        while (join := self._joins.get()) is not None:
            self._generation = join.generation
            self._control.pause = self._control.pause_saves = False
            try:
                worker = worker or self._worker()
                self._take_part(worker, join)
            except Exception as error:  # noqa: BLE001 - a process's edge: whatever it is, it is told
                self._tell(error)
            finally:
                self._control.phase, self._control.waiting = "waiting", False
                if self._bond is not None:
                    self._bond.dissolve()
                    self._bond = None
        if worker is not None:
            worker.close()

    def _early_worker(self) -> Worker | None:
        """Made while the others are being called together. What goes wrong is told when it is needed."""
        with contextlib.suppress(Exception):
            return self._worker()
        return None

    def _worker(self) -> Worker:
        return Worker(
            self._recipe,
            self._spec.run,
            DatasetFacts.model_validate(self._spec.facts),
            report=self._report,
            epoch=self._spec.epoch,
            member=self._spec.member,
        )

    def _take_part(self, worker: Worker, join: Join) -> None:
        bond = self._bond = Bond()
        if self._parted >= join.generation:
            raise dist.DistNetworkError("the group broke before it was formed")
        store = None
        if join.world > 1:
            self._control.phase = "joining"
            if join.port is not None:
                store = reach_store(join.host, join.port, join.world)
            else:
                store = host_store(join.world)
                self._say(Hosting(generation=join.generation, port=store.port))
        group = Group(join.rank, join.world, join.generation, join.attempt, store, host=join.host)
        patience_s = self._recipe.faults.stuck_s + _PATIENCE_MARGIN_S
        bond.form(group, worker_device(self._recipe), patience_s)
        self._control.on_joined = lambda step, source: self._say(
            Joined(generation=join.generation, step=step, source=source)
        )
        outcome = worker.train(group, self._control)
        if outcome.paused:
            self._say(Paused(generation=join.generation, step=outcome.steps, saved=outcome.saved))
        else:
            self._say(
                Ended(generation=join.generation, steps=outcome.steps, samples_per_s=outcome.samples_per_s)
            )

    def _tell(self, error: Exception) -> None:
        if _lost_a_peer(error) or self._parted >= self._generation:
            said = shown(str(error).split("\n", 1)[0])
            self._say(Parted(generation=self._generation, step=self._control.step, why=said))
            # The traceback holds the broken group's buckets and hooks; the state must be free of them.
            traceback.clear_frames(error.__traceback__)
            return
        told = _told(error)
        if isinstance(error, TandemError):
            retryable = told.retryable and not isinstance(error, Conflict)  # someone else drives this run now
        else:
            retryable = not isinstance(error, _MISTAKES)
        if not isinstance(error, TandemError):
            traceback.print_exception(error)
        self._say(Failed(generation=self._generation, error=error_fields(told), retryable=retryable))

    def _report(self, progress: Progress) -> None:
        self._say(Told(generation=self._generation, progress=asdict(progress)))

    def _say(self, message: Frozen) -> None:
        with self._sending:
            try:
                send(self._channel, message)
            except OSError:
                os._exit(1)  # nobody is there to train for

    def _beat(self) -> None:
        pause = threading.Event()
        control = self._control
        while not pause.wait(BEAT_EVERY_S):
            if control.phase in _STORE_PHASES:
                control.progress += 1  # it waits for a store, which has deadlines of its own: no hang
            self._say(
                Beat(
                    generation=self._generation,
                    step=control.step,
                    progress=control.progress,
                    waiting=control.waiting,
                    phase=control.phase,
                )
            )

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                self._obey(parse_order(line))
        os._exit(1)  # the keeper is gone

    def _obey(self, order: Join | Pause | Part | Leave) -> None:
        match order:
            case Join():
                self._joins.put(order)
            case Leave():
                self._joins.put(None)
                if self._control.phase not in ("starting", "waiting"):
                    os._exit(0)  # in the middle of something that the run no longer wants
            case Pause() if order.generation == self._generation:
                self._control.pause_saves = order.save or self._recipe.strategy == "fsdp"
                self._control.pause = True
            case Part() if order.generation >= self._generation:
                self._parted = order.generation
                if order.generation == self._generation:
                    if (bond := self._bond) is not None:
                        bond.abort()
                    self._control.on_part()
            case _:
                pass  # of a generation that has passed


def _lost_a_peer(error: Exception) -> bool:
    """Whether an exchange failed, and not the worker's own code. Gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed by peer", "process group", "socket timeout")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _told(error: Exception) -> TandemError:
    """An error that a person can act on: itself, or for what any code may raise, what and where."""
    if isinstance(error, TandemError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return RunFailed(
            "a worker's device ran out of memory",
            got=shown(str(error).split("\n", 1)[0]),
            fix="set optimization.micro_batch_size, or a smaller one",
        )
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return RunFailed(
        "training failed in the task's own code, or in what it called",
        got=shown(f"{type(error).__name__}: {error}") + where,
        fix="correct it, then run the same command again; with --run NAME a run goes on where it was",
    )
