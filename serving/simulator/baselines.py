"""How others scale, written anew from their documentation and source, to be compared with.

Ray Serve 2.60: `autoscaling_policy.py` and `_private/autoscaling_state.py` (installed here); its defaults.
Knative: the pod autoscaler's documented rules (`autoscaler` config map, "stable" and "panic" mode).
Both scale by requests in flight. Both are asked every second, and round up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from serving.scaling.observed import Seen


@dataclass(slots=True)
class ServeDefault:
    """Ray Serve's own policy: requests in flight by a target, over a look-back, after a delay.

    Its metrics are pushed every 10 s, so it decides on what was known at the last push.
    """

    target_ongoing_requests: float = 2.0
    look_back_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    push_every_s: float = 10.0
    _samples: deque[tuple[float, float]] = field(default_factory=deque)
    _pushed: tuple[tuple[float, float], ...] = ()
    _pushed_s: float = -math.inf
    _direction: int = 0
    _since_s: float = 0.0

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> list[int]:
        """One kind only."""
        self._samples.append((now_s, seen[0].in_flight))
        while self._samples[0][0] < now_s - self.look_back_s:
            self._samples.popleft()
        if now_s - self._pushed_s >= self.push_every_s:
            self._pushed, self._pushed_s = tuple(self._samples), now_s
        target, ready = targets[0], seen[0].ready
        if ready == 0:
            return [target]
        wanted = math.ceil(self._in_flight(now_s) / self.target_ongoing_requests)
        return [self._delayed(wanted, target, now_s)]

    def _in_flight(self, now_s: float) -> float:
        """The mean over the look-back, each sample holding until the next, the last until now."""
        times = [at for at, _ in self._pushed] + [now_s]
        spans = [after - before for before, after in pairwise(times)]
        total_s = sum(spans)
        if total_s <= 0:
            return self._pushed[-1][1]
        return sum(span * value for span, (_, value) in zip(spans, self._pushed, strict=True)) / total_s

    def _delayed(self, wanted: int, target: int, now_s: float) -> int:
        """`wanted` once it has been on the same side of the target for long enough."""
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        if direction == 0:
            return target
        if now_s - self._since_s < (self.upscale_delay_s if direction > 0 else self.downscale_delay_s):
            return target
        self._direction = 0
        return max(1, wanted) if target > 1 else wanted


@dataclass(slots=True)
class Knative:
    """Knative's pod autoscaler (KPA): a stable window, and a short one that takes over in a panic.

    Args:
        target_concurrency: requests in flight per replica, before `utilisation` is taken of it.
    """

    target_concurrency: float = 100.0
    utilisation: float = 0.7
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_threshold: float = 2.0
    max_up: float = 1000.0
    max_down: float = 2.0
    zero_grace_s: float = 30.0
    tick_s: float = 2.0
    _samples: deque[tuple[float, float]] = field(default_factory=deque)
    _asked_s: float = -math.inf
    _panic_since_s: float | None = None
    _panic_replicas: int = 0
    _zero_since_s: float | None = None

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> list[int]:
        """One kind only."""
        self._samples.append((now_s, seen[0].in_flight))
        while self._samples[0][0] <= now_s - self.stable_s:
            self._samples.popleft()
        if now_s - self._asked_s < self.tick_s or targets[0] == 0:
            return [targets[0]]
        self._asked_s = now_s
        ready = max(1, seen[0].ready)
        low, high = math.floor(ready / self.max_down), math.ceil(self.max_up * ready)
        stable = min(max(self._wanted(now_s, self.stable_s), low), high)
        panic = min(max(self._wanted(now_s, self.panic_s), low), high)
        if panic / ready >= self.panic_threshold:
            self._panic_since_s = now_s
        elif self._panic_since_s is not None and now_s - self._panic_since_s > self.stable_s:
            self._panic_since_s, self._panic_replicas = None, 0
        if self._panic_since_s is not None:
            self._panic_replicas = max(self._panic_replicas, panic, ready)
            return [self._panic_replicas]
        return [self._last(stable, now_s)]

    def _wanted(self, now_s: float, window_s: float) -> int:
        window = [value for at, value in self._samples if at > now_s - window_s]
        return math.ceil(sum(window) / len(window) / (self.target_concurrency * self.utilisation))

    def _last(self, wanted: int, now_s: float) -> int:
        """The last replica stays for a grace period."""
        if wanted > 0:
            self._zero_since_s = None
            return wanted
        if self._zero_since_s is None:
            self._zero_since_s = now_s
        return 0 if now_s - self._zero_since_s >= self.zero_grace_s else 1
