"""Where a run's processes may be: seats, nodes, loans, and what Ray Train is asked to hold instead.

A part of `training.crew.roster`, which owns it. Knows nothing of processes but which nodes they work on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.crew.loan import Loan
from training.crew.roles import Member, Resize, Rules, Seat

_GROWS_AFTER_S = 2.0
"""Room has to be there for so long before it is asked for: what others start and end at once is no room."""


class Places:
    """Seats come in groups: one group for each time that Ray Train starts its workers."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._groups: dict[str, dict[int, Seat]] = {}
        self._gone: set[str] = set()
        self._current = ""
        self._heard_s = 0.0
        self._wanted_s: dict[str, float] = {}  # since when a node is without a keeper
        self._lost_nodes: frozenset[str] = frozenset()
        self._asked: tuple[str, Resize] | None = None
        self._asked_s = 0.0
        self._room = 0
        self._room_since_s = math.inf
        self.keepers: set[str] = set()
        """Nodes on which processes can be started."""
        self._bereft: set[str] = set()  # nodes that had a keeper, and have none
        self.draining: frozenset[str] = frozenset()
        self.dead: frozenset[str] = frozenset()
        """Nodes that will not come back, so that no keeper of theirs is worth waiting for."""
        self.loan = Loan(rules)

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Of the newest group that is complete, by rank."""
        group = self._groups.get(self._current, {})
        return tuple(group[rank] for rank in sorted(group))

    @property
    def asked(self) -> bool:
        """Whether Ray Train is about to hold something else."""
        return self._asked is not None

    @property
    def limit(self) -> int:
        """How many workers the run may have now."""
        return self.loan.limit

    def room_to_work(self, now_s: float) -> int:
        """How many may work now: no more than Ray Train was asked to hold, although it still holds others.

        Who is put to work on a seat that is being given away is stopped again a moment later.
        """
        if self._asked is None or now_s - self._asked_s >= self._rules.ask_again_s:
            return self.limit
        return min(self.limit, self._asked[1].workers)

    @property
    def without_keeper(self) -> frozenset[str]:
        """Nodes on which no process can be started."""
        return self._lost_nodes

    def seat_taken(self, seat: Seat, now_s: float) -> None:
        if seat.group in self._gone:
            return  # said before it was replaced, and late
        group = self._groups.setdefault(seat.group, {})
        group[seat.rank] = seat
        newest = next(reversed(self._groups))
        if seat.group == newest and len(group) == seat.world and self._current != newest:
            self._current = newest
            self._gone.update(name for name in self._groups if name != newest)
            self._groups = {newest: group}
            self._asked = None
        if seat.group == self._current:
            self._heard_s = now_s

    def keeper_up(self, node: str) -> None:
        self.keepers.add(node)
        self._bereft.discard(node)

    def keeper_lost(self, node: str, now_s: float) -> None:
        self.keepers.discard(node)
        self._bereft.add(node)
        self._wanted_s.pop(node, None)

    def keepers_needed(self, now_s: float) -> list[str]:
        """Nodes that have seats and want a keeper; each is named once, and again where none came."""
        needed = []
        nodes = {seat.node for group in self._groups.values() for seat in group.values()}
        self._wanted_s = {n: s for n, s in self._wanted_s.items() if n in nodes and n not in self.keepers}
        for node in sorted(nodes - self.keepers):
            if node not in self._wanted_s:
                self._wanted_s[node] = now_s
                needed.append(node)
        self._lost_nodes = frozenset(
            n for n, since_s in self._wanted_s.items() if now_s - since_s > self._rules.keeper_s
        )
        return needed

    def usable(self, now_s: float) -> list[Seat]:
        """Seats that processes may take now; none while it is worth waiting for more.

        Where enough are left, those of a node that lost its keeper aren't waited for: mostly the whole node
        is gone, which Ray notices ten seconds later, and if it isn't, joining them again costs a second.
        """
        if self.unseated(now_s):
            return []
        staying = [seat for seat in self.seats if seat.node not in self.draining]
        usable = [seat for seat in staying if seat.node in self.keepers]
        enough = len(usable) >= self._rules.min_workers
        patience_s = self._rules.keeper_s / 4 if enough else self._rules.keeper_s
        passed_over = self.dead | self._bereft if enough else self.dead
        awaited = [s for s in staying if s.node not in self.keepers and s.node not in passed_over]
        if not enough or any(now_s - self._wanted_s.get(s.node, now_s) <= patience_s for s in awaited):
            return []
        return usable

    def unseated(self, now_s: float) -> bool:
        """Whether nobody has held the seats for longer than processes may do without."""
        return bool(self._current) and now_s - self._heard_s > self._rules.unseated_s

    def capacity(self, workers: int, now_s: float) -> None:
        if workers <= len(self.seats):
            self._room_since_s = math.inf
        elif self._room_since_s == math.inf:
            self._room_since_s = now_s
        self._room = workers

    def lend(self, workers: int, for_s: float) -> None:
        """Do with fewer workers for a while.

        Raises:
            BadInput: as `training.crew.loan.Loan.begin` says.
        """
        self.loan.begin(workers, for_s, len(self.seats))

    def loan_over(self, now_s: float) -> bool:
        """Whether a loan has just ended."""
        return self.loan.over(len(self.seats), now_s)

    def resize(self, at_work: Sequence[Member], *, steady: bool, now_s: float) -> Resize | None:
        """What Ray Train should hold instead of what it holds; None if that is well, or asked for already.

        Args:
            at_work: the members of the running generation.
            steady: whether it makes steps.
        """
        wanted = self._wanted(at_work, steady, now_s)
        if wanted is None:
            return None
        if self._asked is not None and now_s - self._asked_s < self._rules.ask_again_s:
            group, asked = self._asked
            if (group, asked.workers, asked.avoid) == (self._current, wanted.workers, wanted.avoid):
                return None
        self._asked, self._asked_s = (self._current, wanted), now_s
        return wanted

    def excuse(self, for_s: float) -> None:
        """This process stood still for so long."""
        self._heard_s += for_s
        self._asked_s += for_s
        self._wanted_s = {node: since_s + for_s for node, since_s in self._wanted_s.items()}

    def _wanted(self, at_work: Sequence[Member], steady: bool, now_s: float) -> Resize | None:
        held, rules = len(self.seats), self._rules
        if not held:
            return None
        avoid = self.draining | self._lost_nodes
        if any(seat.node in avoid for seat in self.seats):
            if any(member.node in avoid for member in at_work):
                return None  # they are being paused
            workers = min(self.limit, max(rules.min_workers, self._room or held))
            return Resize(workers, avoid=tuple(sorted(avoid)))
        if held > self.limit:
            if len(at_work) > self.limit:
                return None
            return Resize(self.limit, within=tuple(sorted({member.node for member in at_work})))
        workers = min(self.limit, self._room)
        settled = now_s - self._room_since_s >= _GROWS_AFTER_S
        return Resize(workers, avoid=tuple(sorted(avoid))) if steady and settled and workers > held else None
