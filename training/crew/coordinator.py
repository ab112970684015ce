"""The coordinator: one actor of a run, which decides who trains, and tells the driver what happens.

What is decided stands in the roster, which is pure; here are the clock, the keepers, Ray's own view
of the cluster, and those who ask: Ray Train's workers (`attend`), its policy (`room`, `wanted`), the driver
(`news`) and people (`lend`, `take_back`, `status`). If it dies, so does the run; the same command
continues it.

Knows Ray; never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import TandemError
from cluster.events import EventWriter
from cluster.runs import Run
from cluster.storage import open_store
from training.crew.keeper import Keeper
from training.crew.messages import Leave, parse_saying
from training.crew.roles import (
    Decision,
    End,
    Exit,
    Forward,
    Hire,
    Kill,
    NeedKeeper,
    Note,
    Outcome,
    Record,
    Resize,
    Rules,
    Seat,
    Tell,
)
from training.crew.roster import Roster
from training.metrics import RunMetrics
from training.progress import Progress

TICK_S = 0.5
"""Deaths and sayings are heard at once; what a tick finds, such as silence, takes seconds anyway."""
SURVEY_S = 1.0
SURVEY_FIXED_S = 5.0
"""Where the number of workers is fixed: only nodes that are about to be taken away are looked for."""
ANSWER_S = 5.0
"""How long those who wait for news wait at a time; a seat is thought lost after several times that."""
_KEEPER_START_S = 20.0
_FAREWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the coordinator of a run is made with."""

    rules: Rules
    store: str
    """Where the run's events go."""
    spec: dict[str, Any]
    """Of every member, but for its name and devices (`training.crew.messages.Spec`)."""
    worker: dict[str, float]
    """Ray's resources of one worker."""
    life: str
    """What members live by, as `module:function`."""


@dataclass(frozen=True, slots=True)
class News:
    """What the driver hasn't been told yet."""

    notes: tuple[str, ...]
    progress: dict[str, Any] | None
    end: Outcome | TandemError | None
    groups: tuple[str, ...]
    """The placement groups seen so far, by id: what Ray Train may leave behind if it is killed."""


def new_keeper(node: str, life: str) -> Any:
    """Start a keeper on a node; the handle, at once. It serves whichever coordinator employs it."""
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    keeper: Any = ray.remote(num_cpus=0, scheduling_strategy=affinity, max_concurrency=100)(Keeper)
    return keeper.remote(node, life)


class Coordinator:
    """An asyncio actor, on the driver's node."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        run = Run(open_store(plan.store), plan.rules.run)
        self._events = EventWriter(run.store, run.prefix, f"{plan.rules.attempt}-coordinator")
        self._roster = Roster(plan.rules, time.monotonic())
        self._keepers: dict[str, _Post] = {}
        self._nodes: dict[str, str] = {}  # member -> node
        self._pids: dict[str, int] = {}
        self._notes: list[str] = []
        self._progress: dict[str, Any] | None = None
        self._metrics = RunMetrics(plan.rules.run)
        self._end: Outcome | TandemError | None = None
        self._resize: Resize | None = None
        self._rooms = 0
        self._groups: list[str] = []
        self._news, self._resized = asyncio.Event(), asyncio.Event()
        self._over, self._deserted = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # The driver.

    async def begin(self, keepers: dict[str, Any]) -> None:
        """Take over the keepers that the driver has started, by node, and begin to watch."""
        self._me = ray.get_runtime_context().current_actor
        for node, handle in keepers.items():
            self._employ(node, handle)
        self._start(self._tick())
        self._start(self._survey())

    async def news(self) -> News:
        """What is new, as soon as there is something."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), ANSWER_S)
        self._news.clear()
        news = News(tuple(self._notes), self._progress, self._end, tuple(self._groups))
        self._notes, self._progress = [], None
        return news

    async def farewell(self) -> None:
        """Wait, not for long, until every member has left and every event is written."""
        self._over.set()
        for member in list(self._nodes):
            self._order("tell", member, _line(Leave()))
        if not self._nodes:
            self._deserted.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._deserted.wait(), _FAREWELL_S)
        await asyncio.to_thread(self._events.flush)

    # Ray Train.

    async def attend(self, seat: Seat) -> bool:
        """A worker of Ray Train's holds this seat. Answers after a while whether it is still wanted."""
        if seat.group not in self._groups:
            self._groups.append(seat.group)
            self._news.set()
        self._rooms = 0
        self._carry_out(self._roster.seat_taken(seat, time.monotonic()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), ANSWER_S)
        return not self._over.is_set()

    async def room(self) -> Resize | None:
        """With how many workers Ray Train should start now; None while there are too few."""
        rules = self._plan.rules
        avoid = tuple(sorted(self._roster.avoided))
        self._rooms += 1
        if rules.min_workers == rules.max_workers:
            return Resize(rules.max_workers, avoid=avoid)
        # The old workers' resources are just being freed; on the second try they are someone else's.
        held = self._roster.seats if self._rooms < 3 else ()
        workers = await asyncio.to_thread(_capacity, self._plan.worker, held, self._roster.avoided)
        if workers < rules.min_workers:
            await asyncio.sleep(SURVEY_S / 2)
            return None
        return Resize(min(workers, self._roster.limit), avoid=avoid)

    async def wanted(self) -> Resize | None:
        """Another size, as soon as one is wanted."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._resized.wait(), ANSWER_S)
        self._resized.clear()
        resize, self._resize = self._resize, None
        return resize

    # Keepers.

    async def hear(self, node: str, keeper: int, batch: Sequence[tuple[Any, ...]]) -> bool:
        """What a keeper's members said and did; answers whether the keeper is still wanted."""
        post = self._keepers.get(node)
        if post is None or post.keeper not in (None, keeper):
            return False
        post.keeper, post.heard_s = keeper, time.monotonic()
        self._carry_out(self._roster.keeper_up(node, post.heard_s))
        for what, *rest in batch:
            self._heard(node, what, rest)
        return node in self._keepers

    def _heard(self, node: str, what: str, rest: list[Any]) -> None:
        now_s = time.monotonic()
        if what == "said":
            self._carry_out(self._roster.heard(rest[0], parse_saying(rest[1]), now_s))
        elif what == "born":
            self._pids[rest[0]] = rest[1]
        elif what == "ended":
            member, code, out_of_memory = rest
            self._gone([member])
            self._carry_out(self._roster.exited(member, Exit(code, out_of_memory), now_s))
        elif what == "nursery-lost":
            self._dismiss(node, "the process that starts workers was lost")

    def _employ(self, node: str, handle: Any) -> None:
        post = _Post(handle)
        self._keepers[node] = post
        self._start(self._until_lost(node, post))
        self._start(post.send())

    async def _until_lost(self, node: str, post: _Post) -> None:
        try:
            await post.handle.work.remote(self._me)
            why = "its keeper ended"
        except ray.exceptions.RayError:
            why = "its node was lost" if await self._is_dead(node) else "its keeper was lost"
        if self._keepers.get(node) is post:
            self._dismiss(node, why)

    async def _is_dead(self, node: str) -> bool:
        """Whether Ray has lost a node; if so, nothing is waited for there."""
        with contextlib.suppress(Exception):  # Ray's state raises whatever; the survey looks again
            dead = await asyncio.to_thread(_dead_nodes)
            self._carry_out(self._roster.dead(dead, time.monotonic()))
            return node in dead
        return False

    def _dismiss(self, node: str, why: str) -> None:
        post = self._keepers.pop(node)
        post.orders.put_nowait(None)
        ray.kill(post.handle)
        self._gone([member for member, where in self._nodes.items() if where == node])
        self._carry_out(self._roster.keeper_lost(node, why, time.monotonic()))

    def _gone(self, members: list[str]) -> None:
        for member in members:
            self._nodes.pop(member, None)
            self._pids.pop(member, None)
        if not self._nodes:
            self._deserted.set()

    async def _find_keeper(self, node: str) -> None:
        """A keeper for a node that has none: only as long as it has seats, and is alive."""
        while not self._over.is_set() and node not in self._keepers:
            self._employ(node, new_keeper(node, self._plan.life))
            await asyncio.sleep(_KEEPER_START_S)
            if node not in {seat.node for seat in self._roster.seats}:
                return

    # People.

    async def lend(self, workers: int, for_s: float) -> dict[str, Any]:
        """Do with fewer workers for `for_s` seconds; answers once their resources are free.

        Raises:
            BadInput: the run can't spare so many.
        """
        started_s = time.monotonic()
        self._carry_out(self._roster.lend(workers, for_s, started_s))
        while self._roster.seats_above_limit and not self._over.is_set():
            await asyncio.sleep(0.05)
        return {"lent": workers, "for_s": for_s, "took_s": round(time.monotonic() - started_s, 3)}

    async def take_back(self) -> None:
        """End a loan before its time."""
        self._carry_out(self._roster.take_back(time.monotonic()))

    async def status(self) -> dict[str, Any]:
        """Where the run stands."""
        summary = self._roster.summary(time.monotonic())
        for name, member in summary["members"].items():
            member["pid"] = self._pids.get(name)
        return {"run": self._plan.rules.run, "store": self._plan.store, **summary}

    # Time.

    async def _tick(self) -> None:
        while not self._over.is_set():
            now_s = time.monotonic()
            self._carry_out(self._roster.tick(now_s))
            for node, post in list(self._keepers.items()):
                # Until it first speaks, a keeper is being started, and Ray says so if that fails.
                if post.heard_s and now_s - post.heard_s > self._plan.rules.silent_s + 2:
                    self._dismiss(node, "its node is silent")
            await asyncio.sleep(TICK_S)

    async def _survey(self) -> None:
        """Look now and then for nodes that are being taken away, and for room to grow."""
        elastic = self._plan.rules.min_workers < self._plan.rules.max_workers
        while not self._over.is_set():
            await asyncio.sleep(SURVEY_S if elastic else SURVEY_FIXED_S)
            try:
                draining = frozenset(await asyncio.to_thread(ray._private.state.state.get_draining_nodes))
                self._carry_out(self._roster.draining(draining, time.monotonic()))
                self._carry_out(self._roster.dead(await asyncio.to_thread(_dead_nodes), time.monotonic()))
                if not elastic or not self._roster.seats:
                    continue
                workers = await asyncio.to_thread(
                    _capacity, self._plan.worker, self._roster.seats, self._roster.avoided
                )
                self._carry_out(self._roster.capacity(workers, time.monotonic()))
            except Exception as error:  # noqa: BLE001 - Ray's state raises whatever; the next look may succeed
                self._events.write("survey-failed", why=str(error))

    # Decisions.

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Tell):
                self._order("tell", decision.member, _line(decision.order))
            elif isinstance(decision, Hire):
                self._hire(decision)
            elif isinstance(decision, Kill):
                self._order("kill", decision.member)
            elif isinstance(decision, NeedKeeper):
                if decision.node not in self._keepers:
                    self._start(self._find_keeper(decision.node))
            elif isinstance(decision, Resize):
                self._resize = decision
                self._resized.set()
            elif isinstance(decision, Record):
                self._events.write(decision.event, **decision.fields)
                self._events.request_flush()  # rare, and what people who look at a run look for
            else:
                self._tell_driver(decision)

    def _tell_driver(self, decision: Note | Forward | End) -> None:
        if isinstance(decision, Note):
            self._notes.append(decision.text)
        elif isinstance(decision, Forward):
            progress = dict(decision.progress)
            note = progress.get("note")
            if note:
                self._notes.append(note)
            self._progress = progress | {"note": ""}
            self._metrics.progress(Progress(**progress))
        else:
            self._end = decision.outcome
            self._over.set()
        self._news.set()

    def _hire(self, decision: Hire) -> None:
        # Without devices none are shown, whatever the node has.
        environment = {**self._plan.spec.get("environment", {})}
        if decision.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(decision.devices)
        self._nodes[decision.member] = decision.node
        self._deserted.clear()
        spec = {**self._plan.spec, "member": decision.member, "environment": environment}
        self._order("hire", decision.member, spec)

    def _order(self, what: str, member: str, *rest: Any) -> None:
        post = self._keepers.get(self._nodes.get(member, ""))
        if post is not None:
            post.orders.put_nowait((what, member, *rest))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Post:
    """One keeper, as the coordinator has it. Orders go one call at a time, so that none overtakes another."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.keeper: int | None = None
        self.heard_s = 0.0
        self.orders: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()

    async def send(self) -> None:
        while (order := await self.orders.get()) is not None:
            batch = [order]
            while not self.orders.empty():
                more = self.orders.get_nowait()
                if more is None:
                    return
                batch.append(more)
            with contextlib.suppress(ray.exceptions.RayError):  # its loss is noticed elsewhere
                await self.handle.do.remote(batch)


def _line(order: Any) -> bytes:
    return bytes(order.model_dump_json().encode()) + b"\n"


def _dead_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


def _capacity(worker: dict[str, float], seats: Sequence[Seat], avoided: frozenset[str]) -> int:
    """For how many workers there is room, those that hold a seat included, on nodes that stay."""
    held: dict[str, int] = {}
    for seat in seats:
        held[seat.node] = held.get(seat.node, 0) + 1
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    free = ray._private.state.available_resources_per_node()
    total = 0
    for node in alive - avoided:
        fits = min(
            int(free.get(node, {}).get(name, 0.0) / need + 1e-9) for name, need in worker.items() if need
        )
        total += fits + held.get(node, 0)
    return total
