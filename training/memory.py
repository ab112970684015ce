"""What one worker holds in memory from one generation to the next, and how a group comes to one state.

A data-parallel state is whole on every worker, so a generation takes it from whoever is furthest ahead.
A sharded one breaks with its group, and is read back from the newest whole checkpoint.

A worker that was not in the latest generations, because it was lent or on its way out, may be all that is
left, with a state older than what the others have saved since: then the checkpoint is taken.

While a state is being overwritten it counts as none: a worker that fails in the middle of it has nothing
to give to the next generation. Neither has one whose state a step may have ruined.
"""

from __future__ import annotations

from typing import Generic, Literal

import torch
import torch.distributed as dist

from cluster.artifacts import Artifacts
from cluster.errors import Damaged, NotFound, StorageError
from cluster.events import EventWriter
from cluster.runs import Run
from training.checkpoints.checkpoint import CheckpointMeta
from training.control import Source
from training.group import Group
from training.line import Line, LineRecord
from training.method import S, States
from training.replicate import Mark, furthest

_LINE_KEY = "line"
_SKIPS_KEY = "skips"
_NONE_READABLE = -1


class Memory(Generic[S]):
    """One worker's. `state` may be asked for once a group has agreed on one.

    Args:
        strategy: the recipe's.
        fingerprint: of the dataset.
        states: what a state is.
        device: what the group exchanges tensors on.
    """

    def __init__(
        self,
        run: Run,
        strategy: Literal["ddp", "fsdp"],
        fingerprint: str,
        states: States[S],
        device: torch.device,
    ) -> None:
        self._run = run
        self._strategy = strategy
        self._states = states
        self._device = device
        self._empty = CheckpointMeta(step=0, cursor=0, fingerprint=fingerprint, ledger=())
        self._sharded = False
        self._state: S | None = None
        self._generation = -1
        """The last one that trained the state."""
        self._record = LineRecord(meta=self._empty, skips={}, newest=0, checkpoint=0)
        self.checkpoint = 0
        """The newest checkpoint that this worker knows of, 0 for none."""
        self.head = 0
        """The newest number taken in the log of checkpoints, as far as this worker knows."""
        self.saved_step = -1
        """The step of the checkpoint that the state came from, -1 where it came from memory, or is fresh."""

    @property
    def state(self) -> S:
        """What the group agreed on, and has trained since."""
        assert self._state is not None, "agree first"
        return self._state

    def line(self, group: Group) -> Line:
        """The state's line, to be continued by this group."""
        return Line(self._record.meta, dict(self._record.skips), group.attempt, group.world)

    def keep(self, line: Line, events: EventWriter) -> None:
        """The group ends: remember where its line stands. A sharded state goes with it, and a ruined one."""
        if self._state is None:
            return
        self._record = LineRecord(
            meta=line.to(self._state),
            skips=line.skips,
            newest=max(self.head, self.checkpoint),
            checkpoint=self.checkpoint,
        )
        if not self._state.sound:
            events.write("state-let-go", step=self._state.step, why="a step may have ruined it, unjudged")
        if self._sharded or not self._state.sound:
            self._state = None

    def agree(self, group: Group, events: EventWriter) -> Source:
        """Come to one state with all ranks of a group.

        Raises:
            Damaged: checkpoints were committed, but none is whole.
            StorageError: the store can't be read.
            RuntimeError: a peer is gone.
        """
        if self._strategy == "fsdp":
            self._state = None  # its shards, or its wholeness, belong to the group before
        self._sharded = self._strategy == "fsdp" and group.world > 1
        source = self._from_anywhere(group, events)
        self._generation = group.generation
        return source

    def _from_anywhere(self, group: Group, events: EventWriter) -> Source:
        mark = Mark(self._state.step, self._generation) if self._state else None
        leader = furthest(group, mark, self._device)
        if leader is None:
            self._share_skips(group)
            return self._from_store(group, events)
        if leader.mark.generation < group.generation - 1:  # others went on without it, and may have saved
            self._share_skips(group)
            if self._has_newer(group, leader.mark.step, events):
                return "store"
        self._share_line(group, leader.rank)
        if not leader.is_shared:
            held = self._state
            if group.rank != leader.rank:
                self._state = None
            state = held or self._states.blank(sharded=False)
            self._states.replicate(state, leader.rank, group)
            state.step, state.cursor = self._record.meta.step, self._record.meta.cursor
            self._state = state
        self.saved_step = -1
        return "memory"

    def go_back(self, group: Group, events: EventWriter) -> CheckpointMeta:
        """Take the state back to the newest whole checkpoint, or to the beginning; every rank does.

        Raises:
            As `agree`.
        """
        self._from_store(group, events)
        return self._record.meta

    def _share_skips(self, group: Group) -> None:
        """What any rank knows to be left out is left out by all."""
        if group.store is None:
            return
        group.store.set(f"{_SKIPS_KEY}/{group.rank}", self._record.model_dump_json())
        skips: dict[int, int] = {}
        for rank in range(group.world):
            told = LineRecord.model_validate_json(group.store.get(f"{_SKIPS_KEY}/{rank}"))
            skips |= told.skips
        self._record = self._record.model_copy(update={"skips": skips})

    def _share_line(self, group: Group, source: int) -> None:
        if group.store is None:
            return
        if group.rank == source:
            group.store.set(_LINE_KEY, self._record.model_dump_json())
        else:
            self._record = LineRecord.model_validate_json(group.store.get(_LINE_KEY))
        self.head = max(self.head, self._record.newest)
        self.checkpoint = max(self.checkpoint, self._record.checkpoint)

    def _has_newer(self, group: Group, step: int, events: EventWriter) -> bool:
        """Take the newest checkpoint that every rank finds whole, if it is beyond `step`.

        A store that is out of reach has none: going on from memory repeats steps at worst, and ends no run.
        """
        head = 0
        if group.rank == 0:
            try:
                head = self._run.checkpoints().head()
            except StorageError as error:
                events.write("checkpoints-not-seen", why=str(error))
        state = self._states.blank(sharded=self._sharded)
        number, meta = self._load_newest(state, group, events, head, beyond=step)
        if number:
            self._adopt(state, number, meta)
        return number > 0

    def _from_store(self, group: Group, events: EventWriter) -> Source:
        """The newest checkpoint that every rank finds whole, loaded on every rank; else a fresh state."""
        held, self._state = self._state, None
        # Anew each time: what a failed load has overwritten must not pass for a beginning.
        state = self._states.blank(sharded=self._sharded)
        head = self._run.checkpoints().head() if group.rank == 0 else 0
        number, meta = self._load_newest(state, group, events, head)
        if not number:
            self._states.begin(state)
        self._state = held
        self._adopt(state, number, meta)
        return "store" if number else "fresh"

    def _adopt(self, state: S, number: int, meta: CheckpointMeta) -> None:
        """Go on with what was loaded from checkpoint `number`, 0 for nothing."""
        held = self._state or state
        # Whoever works with the state that was held goes on with this one.
        if held is not state:
            self._states.replace(held, state)
        held.sound = True
        held.step, held.cursor = meta.step, meta.cursor
        self._state, self.checkpoint = held, number
        self._record = LineRecord(meta=meta, skips=self._record.skips, newest=self.head, checkpoint=number)
        self.saved_step = meta.step if number else -1

    def _load_newest(
        self, state: S, group: Group, events: EventWriter, head: int, beyond: int = -1
    ) -> tuple[int, CheckpointMeta]:
        """Load the newest checkpoint that every rank finds whole, if its step is beyond one.

        Args:
            head: the newest number in the log, which rank 0 has looked up.

        Returns:
            Its number and what it records; 0 where there is none.

        Raises:
            Damaged: any would do, and there are some, but none is whole.
        """
        artifacts = self._run.checkpoints()
        number, tried = self._from_rank_0(group, head), 0
        self.head = max(self.head, number)
        while number > 0:
            found = _standing(artifacts, number, events, beyond) if group.rank == 0 else 0
            number = self._from_rank_0(group, found)
            if number == _NONE_READABLE:
                number, tried = 0, tried + 1
            if number == 0:
                break
            tried += 1
            loaded = self._load(state, artifacts, number, events)
            if self._all(group, loaded is not None):
                assert loaded is not None
                return number, loaded
            number -= 1
        if tried and beyond < 0:
            raise Damaged(
                "no checkpoint of the run is whole",
                got=f"{tried} damaged or deleted checkpoints",
                fix="restore the store from a backup, or start a new run",
            )
        return 0, self._empty

    def _load(
        self, state: S, artifacts: Artifacts, number: int, events: EventWriter
    ) -> CheckpointMeta | None:
        try:
            return self._states.load(state, artifacts, artifacts.read(number))
        except (Damaged, NotFound) as error:
            events.write("checkpoint-passed-over", checkpoint=number, why=str(error))
            return None

    def _from_rank_0(self, group: Group, value: int) -> int:
        shared = torch.tensor(value, device=self._device)
        if group.world > 1:
            dist.broadcast(shared, 0)
        return int(shared)

    def _all(self, group: Group, good: bool) -> bool:
        agreed = torch.tensor(int(good), device=self._device)
        if group.world > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return bool(agreed)


def _standing(artifacts: Artifacts, number: int, events: EventWriter, beyond: int) -> int:
    """The newest checkpoint from `number` downwards whose manifest can be read, if its step is beyond one.

    Returns:
        Its number; 0 where it isn't beyond, or there are none but fences; `_NONE_READABLE` where there are
        others, all damaged.
    """
    none = 0
    for candidate in range(number, 0, -1):
        try:
            manifest = artifacts.read(candidate)
            if not manifest.is_fence:
                return candidate if beyond < 0 or manifest.meta.get("step", 0) > beyond else 0
        except (Damaged, NotFound) as error:
            events.write("checkpoint-passed-over", checkpoint=candidate, why=str(error))
            none = _NONE_READABLE
    return none
