"""The policy that runs in Ray Serve, as the simulator asks it."""

from __future__ import annotations

from collections.abc import Sequence

from serving.scaling.observed import Seen
from serving.scaling.policy import Settings, State, decide


class Ours:
    """`serving.scaling.policy`, with Serve's own rule that the first replica from zero comes alone."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = State()

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> list[int]:
        """One kind only."""
        decision = decide(self._settings, self._state, seen[0], targets[0], now_s)
        self._state = decision.state
        if seen[0].ready == 0 and targets[0] > 0:
            return [targets[0]]
        return [decision.wanted]
