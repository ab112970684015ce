"""What one worker holds in memory from one generation to the next, and how a group comes to one state.

A data-parallel state is whole on every worker, so a generation takes it from whoever is furthest ahead.
A sharded one breaks with its group, and is read back from the newest whole checkpoint.

While a state is being overwritten it counts as none: a worker that fails in the middle of it has nothing
to give to the next generation.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from cluster.errors import Damaged, NotFound
from cluster.events import EventWriter
from cluster.manifest import Artifacts
from cluster.runs import Run
from training.checkpoints.checkpoint import CheckpointMeta, load_checkpoint
from training.control import Source
from training.group import Group
from training.line import Line, LineRecord
from training.loop import TrainState, new_state
from training.recipe import Recipe
from training.replicate import furthest, replicate
from training.sharding import shard
from training.task import Task

_LINE_KEY = "line"
_SKIPS_KEY = "skips"
_NONE_READABLE = -1


class Memory:
    """One worker's. `state` may be asked for once a group has agreed on one."""

    def __init__(self, run: Run, recipe: Recipe, fingerprint: str, task: Task, device: torch.device) -> None:
        self._run = run
        self._recipe = recipe
        self._task = task
        self._device = device
        self._empty = CheckpointMeta(step=0, cursor=0, fingerprint=fingerprint, ledger=())
        self._sharded = False
        self._state: TrainState | None = None
        self._record = LineRecord(meta=self._empty, skips={}, newest=0, checkpoint=0)
        self.checkpoint = 0
        """The newest checkpoint that this worker knows of, 0 for none."""
        self.head = 0
        """The newest number taken in the log of checkpoints, as far as this worker knows."""
        self.saved_step = -1
        """The step of the checkpoint that the state came from, -1 where it came from memory, or is fresh."""

    @property
    def state(self) -> TrainState:
        """What the group agreed on, and has trained since."""
        assert self._state is not None, "agree first"
        return self._state

    def line(self, group: Group) -> Line:
        """The state's line, to be continued by this group."""
        return Line(self._record.meta, dict(self._record.skips), group.attempt, group.world)

    def keep(self, line: Line) -> None:
        """The group ends: remember where its line stands. A sharded state goes with it."""
        if self._state is not None:
            self._record = LineRecord(
                meta=line.to(self._state),
                skips=line.skips,
                newest=max(self.head, self.checkpoint),
                checkpoint=self.checkpoint,
            )
        if self._sharded:
            self._state = None

    def agree(self, group: Group, events: EventWriter) -> Source:
        """Come to one state with all ranks of a group.

        Raises:
            Damaged: checkpoints were committed, but none is whole.
            StorageError: the store can't be read.
            RuntimeError: a peer is gone.
        """
        if self._recipe.strategy == "fsdp":
            self._state = None  # its shards, or its wholeness, belong to the group before
        self._sharded = self._recipe.strategy == "fsdp" and group.world > 1
        held = self._state
        leader = furthest(group, held.step if held else None, self._device)
        if leader is None:
            self._share_skips(group)
            return self._from_store(group, events)
        source, steps = leader
        self._share_line(group, source)
        if any(step != steps[source] for step in steps):
            if group.rank != source:
                self._state = None
            state = held or new_state(self._task, self._recipe.optimization, self._device)
            replicate(state, source, group)
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

    def _from_store(self, group: Group, events: EventWriter) -> Source:
        """The newest checkpoint that every rank finds whole, loaded on every rank; else a fresh state."""
        held, self._state = self._state, None
        prepare = shard if self._sharded else None
        # Anew each time: what a failed load has overwritten must not pass for a beginning.
        state = new_state(self._task, self._recipe.optimization, self._device, prepare)
        artifacts = self._run.checkpoints()
        skips = self._record.skips
        meta = self._empty
        self.head = self._from_rank_0(group, artifacts.head() if group.rank == 0 else 0)
        number, tried = self.head, 0
        while number > 0:
            found = _standing(artifacts, number, events) if group.rank == 0 else 0
            number = self._from_rank_0(group, found)
            if number == _NONE_READABLE:
                number, tried = 0, tried + 1
            if number == 0:
                break
            tried += 1
            loaded = self._load(state, artifacts, number, events)
            if self._all(group, loaded is not None):
                assert loaded is not None
                meta = loaded
                break
            number -= 1
        if tried and meta is self._empty:
            raise Damaged(
                "no checkpoint of the run is whole",
                got=f"{tried} damaged or deleted checkpoints",
                fix="restore the store from a backup, or start a new run",
            )
        state.step, state.cursor = meta.step, meta.cursor
        if held is not None:  # whoever works with the state goes on with this one
            held.model, held.optimizer, held.step, held.cursor = (
                state.model,
                state.optimizer,
                state.step,
                state.cursor,
            )
        self._state, self.checkpoint = held or state, number
        self._record = LineRecord(meta=meta, skips=skips, newest=self.head, checkpoint=number)
        self.saved_step = meta.step if number else -1
        return "store" if number else "fresh"

    def _load(
        self, state: TrainState, artifacts: Artifacts, number: int, events: EventWriter
    ) -> CheckpointMeta | None:
        try:
            return load_checkpoint(state, artifacts, artifacts.read(number))
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


def _standing(artifacts: Artifacts, number: int, events: EventWriter) -> int:
    """The newest checkpoint from `number` downwards whose manifest can be read.

    Returns:
        Its number; 0 where there are none but fences, `_NONE_READABLE` where there are, all damaged.
    """
    none = 0
    for candidate in range(number, 0, -1):
        try:
            if not artifacts.read(candidate).is_fence:
                return candidate
        except (Damaged, NotFound) as error:
            events.write("checkpoint-passed-over", checkpoint=candidate, why=str(error))
            none = _NONE_READABLE
    return none
