"""How long a replica takes from being asked for to being ready, learned from those that were. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

UNKNOWN_S = 10.0
"""What is assumed until a start has been seen."""
_WEIGHT_OF_NEWEST = 0.3
_LONGEST_S = 900.0
"""A replica that isn't ready by then waits for a node, or never will be: nothing is learned from it."""


@dataclass(frozen=True, slots=True)
class Starts:
    """Replicas that were asked for and aren't ready, by when; and what earlier ones took."""

    pending: tuple[float, ...] = ()
    ready: int = 0
    cold_start_s: float = UNKNOWN_S
    seen: int = 0

    def after(self, *, ready: int, target: int, now_s: float) -> Starts:
        """The same, once `ready` replicas are ready and `target` are wanted.

        Those that became ready are taken to be the ones asked for first; those no longer wanted, the last.
        """
        pending, cold_start_s, seen = self.pending, self.cold_start_s, self.seen
        for _ in range(min(max(0, ready - self.ready), len(pending))):
            took_s, pending = now_s - pending[0], pending[1:]
            if 0 < took_s <= _LONGEST_S:
                weight = 1.0 if seen == 0 else _WEIGHT_OF_NEWEST
                cold_start_s += weight * (took_s - cold_start_s)
                seen += 1
        missing = max(0, target - ready)
        pending = pending[:missing] + (now_s,) * (missing - len(pending))
        return replace(self, pending=pending, ready=ready, cold_start_s=cold_start_s, seen=seen)
