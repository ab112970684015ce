"""How all ranks come to do something after the same step, at no cost to the other steps.

Rank 0 *proposes*, at the end of step k, what to do after step k+1, and begins step k+1 only when every
other rank has acknowledged. None of them can have finished step k+1 by then, because each step exchanges
gradients with rank 0. So a thread that waits for proposals is all that it takes: no flag travels with
the steps.

Two other ways were weighed: a flag reduced with every step's gradients costs an exchange a step; a step
far enough in the future, chosen without asking, is a guess about how fast steps are.

Knows torch's key-value store and nothing of what is proposed.
"""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta

from torch._C._distributed_c10d import Store  # torch.distributed's own, where it is typed
from torch.distributed import DistError, DistStoreError

ACKNOWLEDGED_WITHIN_S = 30.0
_LOOK_EVERY_S = 60.0
_CLOSED = "closed"
_CLOSED_WITHIN_S = 2.0


class Agreement:
    """One group's agreements. Rank 0 proposes; every rank asks what is `due` after each of its steps.

    Args:
        store: the group's, for this object alone; None where there is one rank.
    """

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._due: dict[int, str] = {}
        self._proposals = 0
        self._listener: threading.Thread | None = None
        if store is not None and rank > 0:
            self._listener = threading.Thread(target=self._listen, name="agreement", daemon=True)
            self._listener.start()

    def propose(self, what: str, after_step: int) -> None:
        """Rank 0 only, before it begins step `after_step`: all ranks will find `what` due after it.

        Raises:
            RuntimeError: a rank did not acknowledge; it is gone, or stopped.
        """
        assert self._rank == 0
        if self._store is not None and self._world > 1:
            number = self._proposals
            self._proposals += 1
            self._store.set(f"agree/{number}", f"{after_step} {what}")
            self._store.wait([f"agree/{number}/all"], timedelta(seconds=ACKNOWLEDGED_WITHIN_S))
        self._due[after_step] = what

    def is_due(self, step: int) -> bool:
        """Whether something was agreed to be done after `step`."""
        return step in self._due

    def take(self, step: int) -> str | None:
        """What was agreed to be done after `step`; asked once."""
        return self._due.pop(step, None)

    def close(self) -> None:
        """Agree on nothing more. Rank 0's word, or the end of its store, ends the other ranks' listeners."""
        if self._rank == 0 and self._store is not None:
            with contextlib.suppress(DistError):
                self._store.set(f"agree/{self._proposals}", _CLOSED)
        if self._listener is not None:
            self._listener.join(_CLOSED_WITHIN_S)

    def _listen(self) -> None:
        assert self._store is not None
        number = 0
        while True:
            try:
                self._store.wait([f"agree/{number}"], timedelta(seconds=_LOOK_EVERY_S))
                said = self._store.get(f"agree/{number}").decode()
                if said == _CLOSED:
                    return
                step, _, what = said.partition(" ")
                self._due[int(step)] = what
                if self._store.add(f"agree/{number}/count", 1) == self._world - 1:
                    self._store.set(f"agree/{number}/all", "")
            except DistStoreError:
                continue  # nothing was proposed for a while
            except DistError:
                return  # rank 0 is gone, and its store with it: the group breaks anyway
            number += 1
