"""Who is in the group, and what is done when that has to change: the coordinator's state machine.

Told of seats, processes, sayings and time, it answers with decisions (`training.crew.roles`), which the
coordinator carries out (`training.crew.coordinator`). One generation follows another:

    hosting → joining → training → pausing (all stopped after one step, state in memory) ─┐
        ▲          └──────────────→ breaking (a member was lost, the others part) ────────┤
        └─────────────────────────────────────────────────────────────────────────────────┘

Seats and processes are tied loosely, on purpose: when Ray Train renews the workers that hold a run's
resources, the training processes go on, and take whatever seats the new workers bring.

No clock, no Ray, no torch: `now_s` comes with each call, on any monotonic scale.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from cluster.errors import StorageError, TandemError
from training.crew.casting import Cast, cast
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
    Told,
    error_from,
)
from training.crew.places import Places
from training.crew.restarts import Restarts
from training.crew.roles import (
    OUT_OF_MEMORY,
    Decision,
    End,
    Exit,
    Forward,
    Generation,
    Hire,
    Kill,
    Member,
    NeedKeeper,
    Note,
    Outcome,
    Record,
    Rules,
    Seat,
    Tell,
)
from training.crew.troubles import Troubles

Heard = Ready | Hosting | Joined | Beat | Told | Parted | Paused | Ended | Failed
_SOURCES = {"memory": "from memory", "store": "from the newest checkpoint", "fresh": "from the start"}


class Roster:
    """One run's members. Every method that is told something returns what is to be done now."""

    def __init__(
        self, rules: Rules, now_s: float, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._rules = rules
        self._restarts = Restarts(rules.retry_s, uniform)
        self._places = Places(rules)
        self._troubles = Troubles(rules)
        self._members: dict[str, Member] = {}
        self._generation: Generation | None = None
        self._hired = 0
        self._generations = 0
        self._world_before = 0
        self._why = ""
        self._host = ""
        self._tick_s = now_s
        self._over = False
        self._out: list[Decision] = []

    # What it is told.

    def seat_taken(self, seat: Seat, now_s: float) -> list[Decision]:
        """A Ray Train worker holds this seat; said again and again while it does."""
        self._places.seat_taken(seat, now_s)
        return self._settled(now_s)

    def keeper_up(self, node: str, now_s: float) -> list[Decision]:
        """A node can start processes."""
        self._places.keeper_up(node)
        return self._settled(now_s)

    def keeper_lost(self, node: str, why: str, now_s: float) -> list[Decision]:
        """A node's keeper died, or is silent, and with it all processes of that node."""
        if node not in self._places.keepers:
            return []
        self._places.keeper_lost(node, now_s)
        here = [m for m in self._members.values() if m.node == node]
        for n, member in enumerate(here):
            del self._members[member.name]
            if member.doomed_s is None:
                self._lost(member, why, now_s, counts=n == 0)
        return self._settled(now_s)

    def heard(self, name: str, saying: Heard, now_s: float) -> list[Decision]:
        """A member said something. What it says of a generation that has passed is ignored."""
        member = self._members.get(name)
        if member is None or member.doomed_s is not None:
            return []
        member.heard_s = now_s
        if isinstance(saying, Ready):
            member.ready, member.moved_s, member.phase = True, now_s, "waiting"
        elif self._generation and saying.generation == member.generation == self._generation.number:
            self._heard_in(self._generation, member, saying, now_s)
        return self._settled(now_s)

    def exited(self, name: str, how: Exit, now_s: float) -> list[Decision]:
        """A member's process ended."""
        member = self._members.pop(name, None)
        if member is not None and member.doomed_s is None and not member.ended:
            self._lost(member, str(how), now_s)
        return self._settled(now_s)

    def draining(self, nodes: frozenset[str], now_s: float) -> list[Decision]:
        """These nodes are going to be taken away."""
        self._places.draining = nodes
        return self._settled(now_s)

    def dead(self, nodes: frozenset[str], now_s: float) -> list[Decision]:
        """These nodes are gone for good."""
        self._places.dead = nodes
        return self._settled(now_s)

    def capacity(self, workers: int, now_s: float) -> list[Decision]:
        """This run could hold the resources of so many workers in all, on nodes that stay."""
        self._places.capacity(workers, now_s)
        return self._settled(now_s)

    def lend(self, workers: int, for_s: float, now_s: float) -> list[Decision]:
        """Do with fewer workers for a while.

        Raises:
            BadInput: the rest would be fewer than the recipe's `workers.min`, or some are lent already.
        """
        self._places.lend(workers, for_s)
        self._why = f"{workers} lent"
        return self._settled(now_s)

    def take_back(self, now_s: float) -> list[Decision]:
        """End a loan before its time."""
        self._places.loan.end(now_s)
        return self._settled(now_s)

    def tick(self, now_s: float) -> list[Decision]:
        """Time passed; say so several times a second."""
        stood_still_s = now_s - self._tick_s
        self._tick_s = now_s
        if stood_still_s > self._rules.stall_s:
            self._excuse(stood_still_s)
        elif not self._over:
            self._watch(now_s)
        return self._settled(now_s)

    def give_up(self, error: TandemError, now_s: float) -> list[Decision]:
        """End the run with an error."""
        self._end(error)
        return self._settled(now_s)

    # What it can be asked.

    @property
    def limit(self) -> int:
        """How many workers the run may have now."""
        return self._places.limit

    @property
    def avoided(self) -> frozenset[str]:
        """Nodes that no worker should be placed on."""
        return self._places.draining | self._places.without_keeper

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Those held now, by rank."""
        return self._places.seats

    @property
    def seats_above_limit(self) -> bool:
        """Whether more is held than the run may have: what is lent is not free yet."""
        return len(self._places.seats) > self._places.limit

    @property
    def over(self) -> bool:
        """Whether the run's training has ended, well or not."""
        return self._over

    def summary(self, now_s: float) -> dict[str, Any]:
        """The state of things, for people and for tests."""
        generation = self._generation
        return {
            "generation": generation.number if generation else None,
            "phase": generation.phase if generation else "waiting",
            "world": len(generation.members) if generation else 0,
            "step": generation.step if generation else 0,
            "members": {
                m.name: {
                    "node": m.node,
                    "rank": generation.members.index(m.name)
                    if generation and m.name in generation.members
                    else None,
                    "phase": m.phase,
                    "step": m.step,
                    "silent_s": round(now_s - m.heard_s, 3),
                }
                for m in self._members.values()
                if m.doomed_s is None
            },
            "seats": len(self._places.seats),
            "failures": self._troubles.failures,
            "lent": self._places.loan.workers,
            "lent_for_s": self._places.loan.left_s(now_s),
        }

    # Sayings.

    def _heard_in(self, generation: Generation, member: Member, saying: Heard, now_s: float) -> None:  # noqa: PLR0912 - one branch a saying
        if isinstance(saying, Beat):
            if saying.progress != member.progress or saying.step != member.step:
                member.moved_s = now_s
            member.progress, member.step = saying.progress, saying.step
            member.waiting, member.phase = saying.waiting, saying.phase
            self._stepped(generation, now_s)
        elif isinstance(saying, Hosting):
            if generation.phase == "hosting":
                self._to_phase(generation, "joining", now_s)
                for rank, name in enumerate(generation.members):
                    if rank:
                        self._tell_join(generation, rank, name, saying.port)
        elif isinstance(saying, Joined):
            member.joined, member.warm, member.step, member.moved_s = True, True, saying.step, now_s
            member.failures = 0
            generation.sources.add(saying.source)
            if all(name in self._members and self._members[name].joined for name in generation.members):
                self._begin(generation, saying.step, now_s)
        elif isinstance(saying, Told):
            self._troubles.committed(int(saying.progress.get("checkpoint") or 0))
            self._out.append(Forward(saying.progress))
        elif isinstance(saying, Paused):
            member.generation, member.step, member.phase = None, saying.step, "paused"
        elif isinstance(saying, Parted):
            member.generation, member.step, member.phase = None, saying.step, "parted"
            if generation.phase not in ("breaking", "ending"):
                # Its peers broke before the process at fault was seen to end: that is told soon.
                generation.step = max(generation.step, saying.step)
                self._break(generation, now_s, cause=saying.why)
        elif isinstance(saying, Ended):
            member.ended = True
            if generation.members[0] == member.name:
                generation.outcome = Outcome(saying.steps, saying.samples_per_s)
                self._to_phase(generation, "ending", now_s)
        elif isinstance(saying, Failed):
            self._failed(generation, member, saying, now_s)

    def _failed(self, generation: Generation, member: Member, saying: Failed, now_s: float) -> None:
        error = error_from(saying.error)
        if generation.phase == "ending":  # rank 0 has committed the last step
            member.ended = True
            return
        member.generation, member.phase = None, "failed"
        if not saying.retryable:
            self._end(error)
            return
        rank = generation.members.index(member.name)
        what = f"worker {rank} failed: {error.failed}" + (f" ({error.got})" if error.got else "")
        if isinstance(error, StorageError) and not generation.begun:
            self._put_off(generation, error, what, now_s)
            return
        member.failures += 1
        if generation.phase == "breaking":  # all ranks are told of one failure: it counts once
            self._troubles.tell(what)
        else:
            self._count(what, max(member.step, generation.step))
        if member.failures > 1:
            self._dismiss(member, now_s)
        if generation.phase != "breaking":
            self._break(generation, now_s, cause=None)

    def _put_off(self, generation: Generation, error: TandemError, what: str, now_s: float) -> None:
        """The store is out of reach: nobody's fault, and another process would fare no better."""
        if not generation.put_off:  # every rank tells of it
            generation.put_off = True
            pause_s = self._restarts.failed(now_s)
            if pause_s is None:
                self._end(error)
                return
            self._out.append(Note(f"{what}; trying again in {pause_s:.0f} s"))
            self._record("start-put-off", why=what, for_s=round(pause_s, 3))
        if generation.phase != "breaking":
            self._break(generation, now_s, cause=None)

    def _stepped(self, generation: Generation, now_s: float) -> None:
        slowest = min((m.step for m in self._engaged(generation)), default=generation.step)
        if slowest != generation.step:  # it falls when a poisoned batch is undone
            generation.step, generation.step_s = slowest, now_s

    def _begin(self, generation: Generation, step: int, now_s: float) -> None:
        """All have joined: steps are made from now on."""
        self._to_phase(generation, "training", now_s)
        self._restarts.succeeded()
        generation.begun = True
        generation.step, generation.step_s = step, now_s
        source = next((s for s in ("memory", "store", "fresh") if s in generation.sources), "fresh")
        world = len(generation.members)
        self._record(
            "generation-started",
            generation=generation.number,
            attempt=generation.attempt,
            world=world,
            source=source,
            step=step,
        )
        told = self._troubles.take_told()
        if told:
            self._out.append(Note(f"{'; '.join(told)}; going on from step {step}, {_SOURCES[source]}"))
        elif self._world_before and world != self._world_before:
            self._out.append(
                Note(f"{self._world_before} → {world} workers ({self._why}); going on from step {step}")
            )
        if self._world_before and world != self._world_before:
            self._record(
                "resize", **{"from": self._world_before, "to": world, "why": self._why, "step": step}
            )
        if self._places.loan.returned(world):
            self._record("returned", world=world)
        self._world_before, self._why = world, ""

    # Losses.

    def _lost(self, member: Member, how: str, now_s: float, counts: bool = True) -> None:
        """A member is gone that was not sent away; it is in the table no more, or doomed."""
        generation = self._generation
        in_it = generation is not None and (
            member.generation == generation.number
            or (member.name in generation.members and generation.phase in ("hosting", "joining"))
        )
        rank = generation.members.index(member.name) if generation is not None and in_it else None
        self._record("member-lost", member=member.name, rank=rank, how=how, step=member.step)
        who = f"worker {rank}" if rank is not None else "a worker"
        if how == OUT_OF_MEMORY:
            how = f"{how} on node {member.node[:12]}"
        if member.node in self._places.draining:
            self._troubles.tell(f"{who} went with its node ({how})")
        elif counts:
            self._count(f"{who} was lost ({how})", max(member.step, generation.step if generation else 0))
        else:
            self._troubles.tell(f"{who} was lost ({how})")
        if generation is not None and in_it and generation.phase not in ("breaking", "ending"):
            self._break(generation, now_s, cause=None)

    def _count(self, what: str, step: int) -> None:
        error = self._troubles.count(what, step)
        if error is not None:
            self._end(error)

    def _break(self, generation: Generation, now_s: float, cause: str | None) -> None:
        self._to_phase(generation, "breaking", now_s)
        generation.cause = cause
        self._why = self._why or "a worker was lost"
        for member in self._engaged(generation):
            self._out.append(Tell(member.name, Part(generation=generation.number)))

    def _doom(self, member: Member, now_s: float) -> None:
        member.doomed_s = now_s
        self._out.append(Kill(member.name))

    def _dismiss(self, member: Member, now_s: float) -> None:
        member.doomed_s = now_s
        self._out.append(Tell(member.name, Leave()))

    # Time.

    def _excuse(self, for_s: float) -> None:
        """This process stood still itself, so whatever it missed proves nothing."""
        for member in self._members.values():
            member.heard_s += for_s
            member.moved_s += for_s
            member.hired_s += for_s
        if self._generation:
            self._generation.since_s += for_s
            self._generation.step_s += for_s
        self._places.excuse(for_s)

    def _watch(self, now_s: float) -> None:
        rules = self._rules
        for member in list(self._members.values()):
            if member.doomed_s is not None:
                self._see_off(member, now_s)
            elif not member.ready and now_s - max(member.hired_s, member.heard_s) > rules.hire_s:
                self._doom(member, now_s)
                self._lost(member, f"not ready within {rules.hire_s:g} s", now_s)
            elif member.ready and now_s - member.heard_s > rules.silent_s:
                self._doom(member, now_s)
                self._lost(member, f"silent for {rules.silent_s:g} s: stopped, frozen or cut off", now_s)
        if self._generation is not None:
            self._watch_generation(self._generation, now_s)

    def _see_off(self, member: Member, now_s: float) -> None:
        """Those that should be gone get another kill, and are forgotten in the end."""
        assert member.doomed_s is not None
        gone_s = now_s - member.doomed_s
        if gone_s > 6 * self._rules.leave_s:
            del self._members[member.name]
        elif gone_s > self._rules.leave_s and now_s - member.moved_s > self._rules.leave_s:
            member.moved_s = now_s
            self._out.append(Kill(member.name))

    def _watch_generation(self, generation: Generation, now_s: float) -> None:
        rules, engaged = self._rules, self._engaged(generation)
        in_phase_s = now_s - generation.since_s
        if generation.phase == "breaking" and in_phase_s > rules.part_s:
            for member in engaged:
                self._doom(member, now_s)
                self._lost(member, f"didn't part within {rules.part_s:g} s", now_s, counts=False)
        elif generation.phase == "ending" and in_phase_s > rules.end_s:
            for member in engaged:
                member.ended = True
        elif generation.phase in ("hosting", "joining"):
            quiet_s = min([in_phase_s, *(now_s - m.moved_s for m in engaged)])
            if quiet_s > rules.join_s:
                self._replace(engaged, [m for m in engaged if not m.joined], "joining", quiet_s, now_s)
        elif generation.phase in ("training", "pausing"):
            # Outside of steps, such as in a long save, whatever grows is a sign of life.
            busy = [m.moved_s for m in engaged if m.phase not in ("training", "waiting")]
            still_s = now_s - max([generation.step_s, generation.since_s, *busy])
            if still_s > rules.stuck_s and len(engaged) > 1 and all(m.waiting for m in engaged):
                # For one another: they are cut off, or one hides it well, and won't part in time.
                self._break(generation, now_s, cause=f"everybody waits, for {still_s:.0f} s")
            elif still_s > rules.stuck_s:
                self._replace(engaged, engaged, "a step", still_s, now_s)

    def _replace(
        self, engaged: list[Member], suspects: list[Member], doing: str, for_s: float, now_s: float
    ) -> None:
        """Kill those of the suspects that are behind: they keep the others waiting."""
        behind = [m for m in suspects if not m.waiting] or suspects
        if len(behind) == len(engaged) > 1:
            least = min(m.progress for m in behind)
            slowest = [m for m in behind if m.progress == least]
            behind = slowest if len(slowest) < len(behind) else behind
        for n, member in enumerate(behind):
            self._doom(member, now_s)
            self._lost(member, f"stuck in {doing} for {for_s:.0f} s", now_s, counts=n == 0)

    # What follows.

    def _settled(self, now_s: float) -> list[Decision]:
        if not self._over:
            self._settle(now_s)
        out, self._out = self._out, []
        return out

    def _settle(self, now_s: float) -> None:
        self._out += [NeedKeeper(node) for node in self._places.keepers_needed(now_s)]
        if self._places.loan_over(now_s):
            self._why = "returned"
        generation = self._generation
        if generation is not None and generation.phase == "ending":
            if all(m.ended for m in self._engaged(generation)):
                assert generation.outcome is not None
                self._end(generation.outcome)
            return
        if (
            generation is not None
            and generation.phase in ("breaking", "pausing")
            and not self._engaged(generation)
        ):
            told = generation.put_off or bool(self._troubles.told)
            if generation.phase == "breaking" and generation.cause and not told:
                self._count(f"the group broke ({generation.cause})", generation.step)
            generation = self._generation = None
        if self._over:
            return
        plan = self._plan(now_s)
        if generation is None:
            self._form(plan, now_s)
        elif generation.phase == "training":
            self._reshape(generation, plan, now_s)
        self._ask(now_s)

    def _plan(self, now_s: float) -> Cast | None:
        seats = self._places.usable(now_s)
        return cast(seats, self._members, self._places.room_to_work(now_s)) if seats else None

    def _form(self, plan: Cast | None, now_s: float) -> None:
        if plan is None or not self._manned(plan, now_s) or not self._restarts.due(now_s):
            return
        self._generations += 1
        number = self._generations
        phase = "hosting" if len(plan.names) > 1 else "joining"
        generation = Generation(number, f"{self._rules.attempt}-g{number}", plan.names, phase, now_s)
        self._generation = generation
        self._host = plan.seated[0][0].ip
        self._tell_join(generation, 0, plan.names[0], None)

    def _reshape(self, generation: Generation, plan: Cast | None, now_s: float) -> None:
        """Pause a running generation whose members are no longer those it should have."""
        leaving = any(
            self._members[name].node in self._places.draining
            for name in generation.members
            if name in self._members
        )
        if plan is None:
            if leaving or self._places.unseated(now_s):
                self._why = "a node is taken away" if leaving else "its resources were lost"
                self._pause(generation, save=leaving, now_s=now_s)
            return
        if not self._manned(plan, now_s):
            return
        if set(plan.names) != set(generation.members):
            self._why = "a node is taken away" if leaving else self._why or "room for it"
            self._pause(generation, save=leaving, now_s=now_s)
        elif not self._places.asked:
            for member in list(self._members.values()):
                if member.name not in generation.members and member.doomed_s is None:
                    self._dismiss(member, now_s)

    def _manned(self, plan: Cast, now_s: float) -> bool:
        """Whether everybody is there and ready; hires whoever isn't there."""
        for seat in plan.missing:
            self._hired += 1
            name = f"m{self._hired}"
            self._members[name] = Member(name, seat.node, seat.devices, now_s, now_s, moved_s=now_s)
            self._out.append(Hire(seat.node, name, seat.devices))
        return not plan.missing and all(self._members[name].ready for name in plan.names)

    def _pause(self, generation: Generation, *, save: bool, now_s: float) -> None:
        self._to_phase(generation, "pausing", now_s)
        self._out.append(Tell(generation.members[0], Pause(generation=generation.number, save=save)))

    def _ask(self, now_s: float) -> None:
        """Have Ray Train hold other resources, once nobody works on what is given away."""
        generation = self._generation
        named = generation.members if generation is not None else []
        at_work = [self._members[name] for name in named if name in self._members]
        resize = self._places.resize(
            at_work, steady=generation is not None and generation.phase == "training", now_s=now_s
        )
        if resize is not None:
            self._out.append(resize)
            if self._places.loan.handed_over(resize.workers):
                self._record("lent", workers=self._places.loan.workers, world=resize.workers)

    def _tell_join(self, generation: Generation, rank: int, name: str, port: int | None) -> None:
        member = self._members.get(name)
        if member is None or member.doomed_s is not None:
            return  # lost meanwhile; the generation is breaking
        member.generation, member.joined, member.ended = generation.number, False, False
        member.progress, member.waiting, member.phase = -1, False, "joining"
        self._out.append(
            Tell(
                name,
                Join(
                    generation=generation.number,
                    attempt=generation.attempt,
                    rank=rank,
                    world=len(generation.members),
                    host=self._host,
                    port=port,
                ),
            )
        )

    def _engaged(self, generation: Generation) -> list[Member]:
        """Those who were told to join it, and are in it still."""
        named = (self._members.get(name) for name in generation.members)
        return [m for m in named if m and m.generation == generation.number and m.doomed_s is None]

    def _to_phase(self, generation: Generation, phase: str, now_s: float) -> None:
        generation.phase, generation.since_s = phase, now_s

    def _record(self, event: str, **fields: Any) -> None:
        self._out.append(Record(event, fields))

    def _end(self, outcome: Outcome | TandemError) -> None:
        if self._over:
            return
        self._over = True
        if isinstance(outcome, TandemError):
            self._record("gave-up", **outcome.parts())
        for member in self._members.values():
            if member.doomed_s is None:
                self._out.append(Tell(member.name, Leave()))
        self._out.append(End(outcome))
