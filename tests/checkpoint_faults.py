"""Faults done to the checkpoints of real trainers on a real S3 server, and what must hold after each.

Each method of `Campaign` does one fault, proves that it happened, and checks that the newest whole
checkpoint loads with every bit as it was at its step (`saving_trainer.state_at`), that nothing else
does, and that a trainer that was not killed goes on stepping.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from fault_proxy import Fault, FaultProxy, Kind
from saving_trainer import Nursery, Order, Status, state_at, tensors
from seaweed import Seaweed
from torch.distributed import TCPStore

from cluster.artifacts import Artifacts
from cluster.errors import TandemError
from cluster.manifest import Manifest, Writer
from cluster.runs import Run
from cluster.storage import Deadlines, open_store
from training.checkpoints.checkpoint import Restored, restore

WITHIN_S = 60.0
LOOK_EVERY_S = 0.005
QUICK = Deadlines(connect_s=2, request_s=2, retry_s=20)
PUTS_A_SAVE = 6
"""Of two ranks: a file of the model and one of the optimizer each, the layout, the manifest."""


def until(happened: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WITHIN_S
    while not happened():
        assert time.monotonic() < give_up_s, f"still not: {what}"
        time.sleep(LOOK_EVERY_S)


@dataclass
class Group:
    """The trainers of one writer."""

    epoch: int
    pids: list[int]
    statuses: list[Status]
    exchange: TCPStore

    @property
    def steps(self) -> list[int]:
        return [status.step for status in self.statuses]

    @property
    def committed(self) -> int:
        return self.statuses[0].committed

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            try:
                os.kill(self.pids[rank], signal.SIGKILL)
            except ProcessLookupError:
                continue

    def signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)


class Campaign:
    """One run, its trainers, the server, and the proxy between them."""

    def __init__(self, server: Seaweed, proxy: FaultProxy, nursery: Nursery, folder: Path, name: str) -> None:
        self.proxy = proxy
        self.run = Run(open_store(server.uri(Seaweed.BUCKET, name), QUICK), "r")
        self.faults: Counter[str] = Counter()
        self.loads = 0
        self._server = server
        self._nursery = nursery
        self._folder = folder
        self._epoch = 0
        self._step = 0
        self._groups = 0
        self._damaged: set[int] = set()

    @contextmanager
    def training(self, **asked: int | float) -> Iterator[Group]:
        """Two ranks that train as the next driver, from where the newest checkpoint is; killed at the end."""
        self._epoch += 1
        head = self.run.checkpoints().fence(Writer(epoch=self._epoch, generation=0)).number
        exchange = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pids, statuses = [], []
        for rank in range(2):
            self._groups += 1
            path = str(self._folder / f"status-{self._groups}")
            order = Order(
                store=self.run.store.uri,
                endpoint=self.proxy.endpoint,
                run=self.run.name,
                rank=rank,
                world=2,
                port=exchange.port,
                epoch=self._epoch,
                newest=head,
                first_step=self._step,
                status=path,
                **asked,  # type: ignore[arg-type]
            )
            statuses.append(Status(path))
            pids.append(self._nursery.fork(order))
        group = Group(self._epoch, pids, statuses, exchange)
        try:
            yield group
        finally:
            self.proxy.clear()
            self.proxy.release()
            group.kill()
            self._step = max(self._step, *group.steps)

    def commits(self, group: Group, more: int = 1) -> None:
        """Wait until the group has committed so many more checkpoints."""
        wanted = group.committed + more if group.committed else self.run.checkpoints().head() + more
        until(lambda: group.committed >= wanted, f"checkpoint {wanted}, after {group.committed}")

    def load(self, deadlines: Deadlines = QUICK, endpoint: str | None = None) -> Restored:
        """Load as a run that starts does; every bit must be right, and no whole checkpoint passed over."""
        passed_over: list[int] = []
        state = state_at(-1)
        artifacts = self._checkpoints(deadlines, endpoint)
        found = restore(state, artifacts, lambda number, _: passed_over.append(number))
        assert found is not None, "there is a checkpoint"
        self.loads += 1
        truth = tensors(state_at(found.meta.step))
        got = tensors(state)
        assert got.keys() == truth.keys()
        wrong = [name for name, tensor in truth.items() if not torch.equal(tensor, got[name])]
        assert not wrong, f"checkpoint {found.number}, step {found.meta.step}: {wrong}"
        whole = [m for m in self.committed(found.head) if m.number not in self._damaged]
        assert found.number == whole[-1].number, "the newest whole one is used"
        assert set(passed_over) == {n for n in self._damaged if found.number < n <= found.head}
        return found

    def committed(self, head: int) -> list[Manifest]:
        """The newest manifests up to `head`, oldest first; of damaged ones, none."""
        found = []
        for number in range(max(1, head - 12), head + 1):
            try:
                manifest = self.run.checkpoints().read(number)
            except TandemError:
                continue
            if not manifest.is_fence:
                found.append(manifest)
        return found

    def _checkpoints(self, deadlines: Deadlines, endpoint: str | None) -> Artifacts:
        if endpoint is None:
            return self.run.checkpoints()
        before = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        try:
            return Run(open_store(self.run.store.uri, deadlines), self.run.name).checkpoints()
        finally:
            os.environ["AWS_ENDPOINT_URL"] = before

    def kill_at(self, put: int, kind: Kind, victims: tuple[int, ...]) -> None:
        """Kill trainers when the save's upload number `put` is where `kind` says, then let it go on."""
        with self.training() as group:
            self.commits(group)
            before = self.proxy.held
            self.proxy.arm(Fault(kind, method="PUT", key="/checkpoints/", after=put, at_byte=3000))
            until(lambda: self.proxy.held > before, f"{kind} of put {put}")
            group.kill(*victims)
            self.proxy.clear()
            self.proxy.release()
            if victims:
                group.kill()
        self.faults["killed at an upload boundary"] += 1
        self.load()

    def damage(self, how: str, rng: random.Random, *, newest: int = 1) -> None:
        """Damage one object of each of the newest checkpoints; load; put it back; load.

        Of manifests only the oldest of them is lost, so that the others stand behind the hole.
        """
        store = self.run.store
        originals: dict[str, bytes] = {}
        newest_ones = self.committed(self.run.checkpoints().head())[-newest:]
        for manifest in newest_ones[:1] if how == "lost manifest" else newest_ones:
            shards = [entry.key for entry in manifest.files.values()]
            itself = self.run.checkpoints().key(manifest.number)
            keys = {"lost shard": shards, "lost manifest": [itself]}.get(how, [*shards, itself])
            key = rng.choice(keys)
            data = originals[key] = store.get(key)
            at = rng.randrange(len(data))
            if how == "truncation":
                store.put(key, data[:at])
            elif how == "bit flip":
                store.put(key, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            else:
                store.delete([key])
            self._damaged.add(manifest.number)
        self.faults[how] += len(originals)
        self.load()
        for key, data in originals.items():
            store.put(key, data)
        self._damaged = set()

    def spoil_a_load(self, fault: Fault) -> None:
        """Load through a line that fails: the newest must come, or what the line does not let be read."""
        before = self.proxy.counts[fault.kind]
        self.proxy.arm(fault)
        try:
            self.load(QUICK, self.proxy.endpoint)
        finally:
            self.proxy.clear()
        done = self.proxy.counts[fault.kind] - before
        assert done, "the fault did happen"
        self.faults[f"{fault.kind} while loading"] += done

    def trouble_while_saving(self, group: Group, fault: Fault) -> None:
        """A fault on the way to the store: the trainers go on stepping, and a later checkpoint stands."""
        before, committed = self.proxy.counts[fault.kind], group.committed
        self.proxy.arm(fault)
        until(lambda: self.proxy.counts[fault.kind] > before, f"{fault.kind}")
        steps = group.steps
        until(lambda: all(now > then + 3 for now, then in zip(group.steps, steps, strict=True)), "stepping")
        until(lambda: group.committed > committed, f"a checkpoint after {committed}")
        self.proxy.clear()
        self.faults[f"{fault.kind} while saving"] += self.proxy.counts[fault.kind] - before

    def stale_writer(self, put: int, kind: Kind) -> None:
        """Stop a driver in the middle of a commit, let another take over and commit, and wake the first."""
        with self.training() as old:
            self.commits(old)
            before = self.proxy.held
            self.proxy.arm(Fault(kind, method="PUT", key="/checkpoints/", after=put))
            until(lambda: self.proxy.held > before, f"{kind} of put {put}")
            old.signal(signal.SIGSTOP)
            self.proxy.clear()
            with self.training() as new:
                self.commits(new)
                until(lambda: new.committed > 0, "the new driver's checkpoint")
                self.proxy.release()
                old.signal(signal.SIGCONT)
                until(lambda: old.statuses[0].refused, "the old driver is refused")
                self.commits(new)
                last = new.committed
            entries = [self.run.checkpoints().read(n) for n in range(1, last + 1)]
            fence = max(entry.number for entry in entries if entry.is_fence)
            late = [e.number for e in entries if e.number > fence and e.writer and e.writer.epoch < new.epoch]
            assert late == [], "nothing by the old driver stands behind the fence"
        self.faults["stale writer"] += 1
        self.load()

    def storm(self, for_s: float, retry_s: float) -> None:
        """Nothing but 503 for a time: steps go on, and the first checkpoint after it stands."""
        with self.training(retry_s=retry_s) as group:
            self.commits(group)
            self.proxy.arm(Fault(Kind.STATUS, times=None, for_s=for_s))
            ends_s = time.monotonic() + for_s
            stood = self.run.checkpoints().head()
            while time.monotonic() < ends_s - 1:
                steps = group.steps
                now_s = time.monotonic()
                until(lambda s=steps: all(b > a for a, b in zip(s, group.steps, strict=True)), "stepping")  # type: ignore[misc]
                assert time.monotonic() - now_s < 10, "without long pauses"
                time.sleep(0.2)
            assert self.run.checkpoints().head() <= stood + 1, "the storm was one"
            self.load()
            until(lambda: group.committed > stood + 1, "a checkpoint after the storm")
            self.faults["storm of 503s"] += 1
            self.faults["503s in storms"] += self.proxy.counts[Kind.STATUS]
        self.load()
