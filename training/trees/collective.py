"""XGBoost's own collective, formed once in each generation of workers.

Rank 0 runs the tracker, at which XGBoost's workers meet, and tells the others its port through the group's
store. While trees grow, XGBoost reduces histograms over connections that it opens from worker to worker; what
it must not do is end the process when a peer is gone, so nobody tells the tracker of errors: a connection
that ends fails the round (`PeerLost`), and the group's supervisor forms the next generation.

XGBoost's connections are not encrypted, and anyone who reaches the tracker's port may join: the workers'
network must be their own, as it must for torch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import orjson
import torch.distributed as dist
import xgboost as xgb
from xgboost import collective
from xgboost.tracker import RabitTracker

from training.group import Group, cut, open_sockets

_KEY = "xgboost"
_TRIES = 1
"""To reach the tracker: it is there before anyone is told of it, and when it is gone it stays so."""


class PeerLost(dist.DistNetworkError):
    """An exchange with the other ranks failed, because one of them is gone, or was given up."""


class Collective:
    """One rank's membership. Use it as a context: on leaving, whole or broken, another can be formed.

    Args:
        patience_s: how long one exchange may take, before it fails by itself.
    """

    def __init__(self, group: Group, patience_s: float) -> None:
        self._group = group
        self._patience_s = patience_s
        self._before: set[int] | None = None
        self._connections: set[int] | None = None

    def abort(self) -> None:
        """Make whatever waits in an exchange fail, from any thread; while it is being formed, in any
        connection that was opened since."""
        if self._connections is not None:
            cut(self._connections & open_sockets())
        elif self._before is not None:
            cut(open_sockets() - self._before)

    @contextlib.contextmanager
    def formed(self) -> Iterator[None]:
        """Form it with all ranks of the group, for as long as the block runs.

        Raises:
            PeerLost: also for what XGBoost raises within the block because a peer is gone.
        """
        if self._group.world == 1:
            yield
            return
        with _tracker(self._group) as address:
            self._before = open_sockets()
            with _telling_losses():
                collective.init(
                    **address,
                    dmlc_task_id=f"{self._group.rank:06d}",
                    dmlc_timeout=int(self._patience_s),
                    dmlc_retry=_TRIES,
                )
            self._connections = open_sockets() - self._before
            try:
                with _telling_losses():
                    yield
            except BaseException:
                self.abort()  # so that the others needn't wait for this rank
                raise
            finally:
                with contextlib.suppress(xgb.core.XGBoostError):
                    collective.finalize()
                self._before = self._connections = None


@contextlib.contextmanager
def _tracker(group: Group) -> Iterator[dict[str, str | int]]:
    """Where the workers meet; rank 0 runs it until the block is left."""
    assert group.store is not None
    if group.rank:
        yield orjson.loads(group.store.get(_KEY))
        return
    tracker = RabitTracker(n_workers=group.world, host_ip=group.host, sortby="task")
    tracker.start()
    try:
        address = tracker.worker_args()
        group.store.set(_KEY, orjson.dumps(address).decode())
        yield address
    finally:
        with contextlib.suppress(xgb.core.XGBoostError):  # of a group that is broken
            tracker.free()


@contextlib.contextmanager
def _telling_losses() -> Iterator[None]:
    """XGBoost has one class for every error; those of its collective name its sources."""
    try:
        yield
    except xgb.core.XGBoostError as error:
        if "/collective/" not in str(error):
            raise
        raise PeerLost(str(error).split("Stack trace", 1)[0].strip()) from None
