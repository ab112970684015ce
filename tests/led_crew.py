"""Real training processes led by the real roster, without Ray: each is a node of its own.

What the coordinator does with actors is done here with pipes, so that a test can put a process where Ray
would be hard to put: behind a link that is cut, or into a cgroup.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from members import MemberProcess

from cluster.errors import TandemError
from training.crew.keeper import oom_kills
from training.crew.roles import (
    End,
    Exit,
    Forward,
    Hire,
    Kill,
    NeedKeeper,
    Note,
    Outcome,
    Record,
    Rules,
    Seat,
    Tell,
)
from training.crew.roster import Roster
from training.recipe import Recipe

_TICK_S = 0.1


@dataclass(frozen=True)
class Post:
    """Where a process is put, and how."""

    ip: str = "127.0.0.1"
    within: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class LedCrew:
    """One run with a seat at each post, all of which it needs. `records` has the events, with seconds."""

    def __init__(
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        posts: Sequence[Post],
        kills: Callable[[], int] = oom_kills,
    ) -> None:
        """`kills` counts those for want of memory."""
        self._recipe, self._facts, self._posts = recipe, facts, posts
        assert recipe.run is not None
        rules = Rules(
            recipe.run,
            "a",
            len(posts),
            len(posts),
            silent_s=recipe.faults.silent_s,
            stuck_s=recipe.faults.stuck_s,
            max_failures=recipe.max_failures,
        )
        self._roster = Roster(rules, time.monotonic())
        self._said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._members: dict[str, MemberProcess] = {}
        self._killed: set[str] = set()
        self._count_kills = kills
        self._kills = kills()
        self.records: list[tuple[float, Record]] = []
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members.values():
            member.close()

    def lead(self, within_s: float, each_tick: Callable[[], object] = lambda: None) -> Outcome | TandemError:
        """Until the run's end.

        Args:
            each_tick: is called ten times a second.
        """
        give_up_s = time.monotonic() + within_s
        for rank, post in enumerate(self._posts):
            self._obey(self._roster.keeper_up(str(rank), time.monotonic()))
            seat = Seat("group", rank, len(self._posts), str(rank), post.ip)
            self._obey(self._roster.seat_taken(seat, time.monotonic()))
        while (end := self._step()) is None:
            assert time.monotonic() < give_up_s, (self._roster.summary(time.monotonic()), self.records)
            each_tick()
        return end

    @property
    def step(self) -> int:
        """How far the run is."""
        return int(self._roster.summary(time.monotonic())["step"])

    @property
    def phase(self) -> str:
        """What the run is in."""
        return str(self._roster.summary(time.monotonic())["phase"])

    def _step(self) -> Outcome | TandemError | None:
        ends: list[Outcome | TandemError] = []
        try:
            name, saying = self._said.get(timeout=_TICK_S)
            ends += self._obey(self._roster.heard(name, saying, time.monotonic()))
        except queue.Empty:
            pass
        now_s = time.monotonic()
        for rank, post in enumerate(self._posts):
            ends += self._obey(
                self._roster.seat_taken(Seat("group", rank, len(self._posts), str(rank), post.ip), now_s)
            )
        for name, member in list(self._members.items()):
            code = member.process.poll()
            if code is not None:
                del self._members[name]
                member.close()
                starved = code == -9 and name not in self._killed and self._starved()
                ends += self._obey(self._roster.exited(name, Exit(code, starved), now_s))
        ends += self._obey(self._roster.tick(now_s))
        return ends[0] if ends else None

    def _starved(self) -> bool:
        before, self._kills = self._kills, self._count_kills()
        return self._kills > before

    def _obey(self, decisions: Sequence[Any]) -> list[Outcome | TandemError]:
        ends = []
        for decision in decisions:
            if isinstance(decision, Hire):
                post = self._posts[int(decision.node)]
                self._members[decision.member] = MemberProcess(
                    self._recipe,
                    self._facts,
                    decision.member,
                    within=post.within,
                    env=post.env,
                    hear=lambda name, saying: self._said.put((name, saying)),
                )
            elif isinstance(decision, Tell) and decision.member in self._members:
                try:
                    self._members[decision.member].order(decision.order)
                except OSError:
                    continue  # it has just ended
            elif isinstance(decision, Kill) and decision.member in self._members:
                self._killed.add(decision.member)
                self._members[decision.member].kill()
            elif isinstance(decision, Record):
                self.records.append((time.monotonic(), decision))
            elif isinstance(decision, Note):
                self.notes.append(decision.text)
            elif isinstance(decision, Forward):
                self.notes += filter(None, [decision.progress["note"]])
            elif isinstance(decision, NeedKeeper):
                raise AssertionError("every post has its keeper")
            elif isinstance(decision, End):
                ends.append(decision.outcome)
        return ends
