"""A simulated cluster for training.crew.roster: nodes, keepers, training processes, Ray Train; all pretended.

Time is a number that jumps from event to event. Processes talk as members do; a collective ends only
if all of its ranks are alive and unfrozen. Every message takes a random, short time; messages of one sender
are not overtaken. What must never happen is asserted while it runs.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import TandemError
from training.crew.messages import (
    Beat,
    Ended,
    Hosting,
    Join,
    Joined,
    Leave,
    Part,
    Parted,
    Pause,
    Paused,
    Ready,
    Told,
)
from training.crew.roles import End, Exit, Hire, Kill, NeedKeeper, Outcome, Record, Resize, Rules, Seat, Tell
from training.crew.roster import Roster

STEP_S = 0.5


@dataclass
class Process:
    name: str
    node: str
    devices: tuple[str, ...]
    frozen: bool = False
    hung: bool = False
    alive: bool = True
    step: int = 0
    warm: bool = False
    progress: int = 0
    generation: int = 0
    rank: int = -1
    world: int = 0
    active: bool = False
    waiting: bool = False
    phase: str = "waiting"


class World:
    """`nodes` maps a node to the number of workers it has room for."""

    def __init__(self, rules: Rules, nodes: dict[str, int], total_steps: int, seed: int) -> None:
        self.rules, self.nodes, self.total_steps = rules, dict(nodes), total_steps
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.lanes: dict[str, float] = {}
        self.roster = Roster(rules, 0.0)
        self.processes: dict[str, Process] = {}
        self.connected: dict[int, set[str]] = {}
        self.pausing: dict[int, bool] = {}
        self.groups = 0
        self.group: list[Seat] = []
        self.train_is_up = False
        self.slow_s = 0.0
        """By how much more Ray Train takes to start a group."""
        self.taken: dict[str, int] = {}
        """By others, per node."""
        self.draining: frozenset[str] = frozenset()
        self.dead: frozenset[str] = frozenset()
        self.end: Outcome | TandemError | None = None
        self.records: list[Record] = []
        self.roles: set[tuple[int, int]] = set()
        self.redone = 0
        self.most = 0

    # Time.

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now_s + delay_s, next(self.order), act))

    def send(self, lane: str, act: Callable[[], None]) -> None:
        """As a message: short but random, and in order."""
        at_s = max(self.now_s + self.random.uniform(0.001, 0.2), self.lanes.get(lane, 0.0))
        self.lanes[lane] = at_s
        heapq.heappush(self.queue, (at_s, next(self.order), act))

    def run(self, until_s: float) -> None:
        self.after(0, self.tick)
        self.after(0.1, lambda: self.start_group(self.room()))
        for node in self.nodes:
            self.keeper(node)
        while self.queue and self.end is None and self.queue[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self.queue)
            act()

    def tick(self) -> None:
        self.obey(self.roster.tick(self.now_s))
        room = sum(n - self.taken.get(node, 0) for node, n in self.nodes.items() if node not in self.draining)
        if self.group:
            self.obey(self.roster.capacity(max(room, 0), self.now_s))
            self.obey(self.roster.draining(self.draining, self.now_s))
        self.after(0.25, self.tick)

    # Ray Train.

    def room(self) -> int:
        free = sum(
            n - self.taken.get(node, 0) for node, n in self.nodes.items() if node not in self.roster.avoided
        )
        return min(free, self.roster.limit)

    def start_group(self, workers: int, resize: Resize | None = None) -> None:
        """Place a new group of workers, or try again later."""
        self.groups += 1
        number, self.train_is_up = self.groups, False
        self.group = []
        avoid = self.roster.avoided
        places = [
            node
            for node, n in sorted(self.nodes.items())
            for _ in range(n - self.taken.get(node, 0))
            if node not in avoid and node not in self.draining
            if resize is None or not resize.within or node in resize.within
        ]
        if workers < self.rules.min_workers or len(places) < workers:
            self.after(3, lambda: self.groups == number and self.start_group(self.room()))
            return
        slots: dict[str, int] = {}
        seats = []
        for rank, node in enumerate(places[:workers]):
            slot = slots.get(node, 0)
            slots[node] = slot + 1
            seats.append(Seat(f"group{number}", rank, workers, node, "127.0.0.1", (f"d{slot}",)))

        def up() -> None:
            if self.groups == number:
                self.train_is_up, self.group = True, seats
                for seat in seats:
                    self.attend(number, seat)

        self.after(self.slow_s + self.random.uniform(1, 3), up)

    def attend(self, number: int, seat: Seat) -> None:
        if self.groups == number and self.train_is_up and self.end is None:
            self.send(
                f"seat{number}-{seat.rank}", lambda: self.obey(self.roster.seat_taken(seat, self.now_s))
            )
            self.after(5, lambda: self.attend(number, seat))

    def lose_attendant(self) -> None:
        self.start_group(self.room())

    # Keepers and processes.

    def keeper(self, node: str) -> None:
        self.after(
            self.random.uniform(0.5, 2),
            lambda: self.obey(self.roster.keeper_up(node, self.now_s)) if node in self.nodes else None,
        )

    def lose_keeper(self, node: str) -> None:
        for process in self.processes.values():
            if process.node == node:
                self.die(process, told=False)
        self.send("ray", lambda: self.obey(self.roster.keeper_lost(node, "its keeper was lost", self.now_s)))

    def lose_node(self, node: str) -> None:
        self.dead |= {node}
        self.send("ray", lambda: self.obey(self.roster.dead(self.dead, self.now_s)))
        self.lose_keeper(node)
        self.nodes.pop(node, None)
        if any(seat.node == node for seat in self.group):
            self.after(self.random.uniform(0, 8), self.lose_attendant)

    def hire(self, order: Hire) -> None:
        assert order.member not in self.processes
        process = self.processes[order.member] = Process(order.member, order.node, order.devices)
        if order.node not in self.nodes:
            process.alive = False
            return
        self.after(self.random.uniform(0.1, 1.5), lambda: self.born(process))

    def born(self, process: Process) -> None:
        self.say(process, Ready(pid=1))
        self.beat(process)

    def beat(self, process: Process) -> None:
        if process.alive and self.end is None:
            self.say(
                process,
                Beat(
                    generation=process.generation,
                    step=process.step,
                    progress=process.progress,
                    waiting=process.waiting,
                    phase=process.phase,
                ),
            )
            self.after(1.0, lambda: self.beat(process))

    def say(self, process: Process, saying: object) -> None:
        if process.alive and not process.frozen:
            self.send(process.name, lambda: self.obey(self.roster.heard(process.name, saying, self.now_s)))

    def die(self, process: Process, code: int = -9, told: bool = True) -> None:
        if not process.alive:
            return
        process.alive = process.active = False
        if told:
            self.send(
                process.name, lambda: self.obey(self.roster.exited(process.name, Exit(code), self.now_s))
            )

    def freeze(self, process: Process) -> None:
        process.frozen = True

    def tell(self, process: Process, order: object) -> None:
        if not process.alive or process.frozen or process.hung:
            return
        if isinstance(order, Leave):
            self.die(process, 0)
        elif isinstance(order, Join):
            self.join(process, order)
        elif isinstance(order, Part) and process.active and order.generation == process.generation:
            self.part(process)
        elif isinstance(order, Pause) and process.active and order.generation == process.generation:
            self.pausing.setdefault(order.generation, order.save)

    def part(self, process: Process) -> None:
        process.active, process.waiting, process.phase = False, False, "waiting"
        self.say(process, Parted(generation=process.generation, step=process.step, why="a peer is gone"))

    def join(self, process: Process, order: Join) -> None:
        assert order.generation > process.generation, "no generation is joined twice"
        assert not process.active, "one generation at a time"
        assert (order.generation, order.rank) not in self.roles, "one process a rank"
        assert self.rules.min_workers <= order.world <= self.rules.max_workers + 1
        self.roles.add((order.generation, order.rank))
        process.generation, process.rank, process.world = order.generation, order.rank, order.world
        process.active, process.phase, process.waiting = True, "joining", True
        if order.rank == 0 and order.world > 1:
            self.say(process, Hosting(generation=order.generation, port=1))
        members = self.connected.setdefault(order.generation, set())
        members.add(process.name)
        if len(members) == order.world:
            self.after(0.3, lambda: self.joined(order.generation))

    def of(self, generation: int) -> list[Process] | None:
        """The members of a generation, if all of them can take part in a collective."""
        members = [self.processes[name] for name in self.connected[generation]]
        able = all(p.alive and not p.frozen and not p.hung and p.active for p in members)
        return members if able and all(p.generation == generation for p in members) else None

    def joined(self, generation: int) -> None:
        members = self.of(generation)
        if members is None:
            return
        known = self.roster.summary(self.now_s)["members"]  # not told to leave, nor given up
        warm = [p.step for p in members if p.warm]
        step = max(warm, default=0)
        for p in self.processes.values():
            if p.alive and p.warm and not p.frozen and p.name in known:
                assert p.step <= step, "what is in memory is not thrown away"
        self.redone += self.most - step
        self.most = step
        for p in members:
            p.step, p.warm, p.phase, p.waiting = step, True, "training", False
            self.say(p, Joined(generation=generation, step=step, source="memory" if warm else "fresh"))
        self.after(STEP_S, lambda: self.step(generation))

    def step(self, generation: int) -> None:
        members = self.of(generation)
        if members is None:
            for p in (self.processes[name] for name in self.connected[generation]):
                if p.active and p.alive and p.generation == generation and not (p.hung or p.frozen):
                    p.waiting = True
                    if self.random.random() < 0.5:  # some notice that the connection is gone
                        dead = any(not self.processes[n].alive for n in self.connected[generation])
                        if dead:
                            self.part(p)
            return
        pause = generation in self.pausing
        for p in members:
            p.step += 1
            p.progress += 1
            self.most = max(self.most, p.step)
            if p.rank == 0:
                checkpoint = p.step // 5
                self.say(p, Told(generation=generation, progress={"checkpoint": checkpoint}))
            if p.step == self.total_steps:
                self.say(p, Ended(generation=generation, steps=p.step, samples_per_s=1.0))
                p.active = False
            elif pause:
                p.active, p.phase = False, "waiting"
                self.say(p, Paused(generation=generation, step=p.step, saved=self.pausing[generation]))
        if not pause and members[0].step < self.total_steps:
            self.after(STEP_S, lambda: self.step(generation))

    # Decisions.

    def obey(self, decisions: list) -> None:
        for decision in decisions:
            if isinstance(decision, Hire):
                self.hire(decision)
            elif isinstance(decision, Tell):
                process, order = self.processes[decision.member], decision.order
                self.send(f"to {process.name}", lambda p=process, o=order: self.tell(p, o))
            elif isinstance(decision, Kill):
                process = self.processes[decision.member]
                self.send(f"to {process.name}", lambda p=process: self.die(p))
            elif isinstance(decision, NeedKeeper):
                self.keeper(decision.node)
            elif isinstance(decision, Resize):
                if self.train_is_up:
                    self.send("policy", lambda r=decision: self.start_group(r.workers, r))
            elif isinstance(decision, Record):
                self.records.append(decision)
            elif isinstance(decision, End):
                assert self.end is None, "a run ends once"
                self.end = decision.outcome
