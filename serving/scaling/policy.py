"""How many replicas a model should have. Pure: settings, state, what is seen and the time in; a decision out.

    forecast     rows a second, one cold start from now                     (serving.scaling.forecast)
    + spread     what chance adds to them within the time a queue can hold
    / capacity   rows a second that one replica answers in time, as its latency model says; less where
                 replicas lose requests though the model says that they needn't
    + backlog    what waits beyond that, to be worked off within a few seconds
    = wanted     at once where it is more; where it is less, only when it has been less for a while
    zero         where nothing has come for `idle_s` and `least` is 0

A burst is a panic: when what waits or is lost shows that the load has outrun the replicas, the newest
second counts rather than the forecast, and nothing is stopped for a while.

Knows nothing of Ray. Whatever numbers it is shown, it answers within the bounds and doesn't raise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from serving.load import WINDOW_S
from serving.scaling.forecast import FORECASTS
from serving.scaling.observed import Seen
from serving.scaling.starts import Starts

_STEP_S = 1.0
_LEVEL_STEPS = 30
_LONGEST_GAP_S = 30.0
"""After so long without a look, the history says nothing of now."""
CAPACITY_S = 1.0
"""Rows a second that a replica is taken to do before anything is known of it: few enough to start another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the service says, and the policy's own constants."""

    least: int = 1
    most: int = 1
    slo_s: float = 1.0
    idle_s: float = 60.0
    """Without a request for so long, the last replica is stopped, where `least` is 0."""
    forecast: str = "rises"
    caution: float = 0.95
    """The share of past rises that is provided for."""
    chance: float = 1.0
    """Standard deviations of the number of requests within an SLO that are provided for."""
    history_s: int = 600
    drain_s: float = 5.0
    """A backlog should be gone after so long."""
    hold_cold_starts: float = 3.0
    """A replica is stopped once it hasn't been needed for so many cold starts, ..."""
    hold_least_s: float = 90.0
    """... and at least for so long."""
    tolerated_share: float = 0.001
    """Of the rows, so many may be lost before anything is learned from it."""
    doubt_s: float = 3600.0
    """How slowly what was learned from losses is forgotten."""
    worst_share: float = 0.1
    """Of the capacity that the latency model promises, at least so much is believed."""


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered between decisions."""

    rates: tuple[float, ...] = ()
    """Rows a second, one for each second, the newest last."""
    rates_s: float = -math.inf
    """When the newest of them was seen."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(when, replicas): the later of equal or smaller ones make earlier ones moot, so it is descending."""
    capacity_s: float = CAPACITY_S
    share: float = 1.0
    """How much of its capacity a replica turned out to be good for, with requests coming as they do."""
    ready: int = 0
    ready_since_s: float = -math.inf
    """Since when there have been as many replicas as now."""
    busy_s: float = -math.inf
    """When a request was last seen."""
    starts: Starts = field(default_factory=Starts)

    def asked_for_at(self, at_s: float) -> State:
        """The same, where a replica was asked for at `at_s` by somebody else."""
        if self.starts.pending:
            return self
        return replace(self, starts=replace(self.starts, pending=(at_s,)))


@dataclass(frozen=True, slots=True)
class Decision:
    """Replicas wanted, and what to remember. `need` is the number before stabilisation and bounds."""

    wanted: int
    state: State
    need: float = 0.0


def decide(settings: Settings, state: State, seen: Seen, target: int, now_s: float) -> Decision:
    """Decide once.

    Args:
        target: replicas that were wanted until now.
        now_s: on any clock that doesn't go back; if it does, the history starts anew.
    """
    seen = seen.sane()
    if not math.isfinite(now_s):
        return Decision(_bounded(settings, target), state)
    state = remember(settings, state, seen, target, now_s)
    need = rows_needed(settings, state, seen, state.starts.cold_start_s) / state.capacity_s
    # An idle model is wanted no more, whatever is left in its history.
    wanted = 0 if idle(settings, state, now_s) else max(1, math.ceil(min(settings.most, need) - 1e-9))
    wanted = _bounded(settings, wanted)
    state, held = _held(settings, state, wanted, now_s)
    wanted = _bounded(settings, held)
    starts = state.starts.after(ready=seen.ready, target=wanted, now_s=now_s)
    return Decision(wanted, replace(state, starts=starts), need)


def remember(settings: Settings, state: State, seen: Seen, target: int, now_s: float) -> State:
    """The state with what is seen now in its history; nothing is decided."""
    gap_s = now_s - state.rates_s
    if gap_s < 0 or gap_s > _LONGEST_GAP_S:
        state = replace(state, rates=(seen.arriving_rows_s,), rates_s=now_s, wanted=((now_s, target),))
        state = replace(state, busy_s=now_s if target > 0 else -math.inf)
    elif steps := int(gap_s / _STEP_S + 1e-6):
        rates = (*state.rates, *(seen.arriving_rows_s,) * steps)[-settings.history_s :]
        state = replace(state, rates=rates, rates_s=state.rates_s + steps * _STEP_S)
    if seen.arriving_rows_s > 0 or seen.waiting_rows > 0:
        state = replace(state, busy_s=now_s)
    state = replace(state, capacity_s=seen.capacity_rows_s or state.capacity_s)
    return _learn_share(settings, state, seen, now_s, min(max(gap_s, 0.0), _LONGEST_GAP_S))


def rows_needed(settings: Settings, state: State, seen: Seen, horizon_s: float) -> float:
    """Rows a second to provide for, over the next `horizon_s`."""
    forecast = FORECASTS[settings.forecast]
    expected = max(forecast(state.rates, horizon_s, settings.caution), seen.arriving_rows_s)
    spread = settings.chance * math.sqrt(expected / settings.slo_s)
    in_time = seen.ready * state.capacity_s * settings.slo_s / 2
    backlog = max(0.0, seen.waiting_rows - in_time) / settings.drain_s
    return max(expected + spread, _level_s(state) / state.share) + backlog


def _learn_share(settings: Settings, state: State, seen: Seen, now_s: float, elapsed_s: float) -> State:
    """Learn from losses what a replica is good for.

    A capacity holds for requests that come evenly. Where they come in bunches, replicas lose some and idle
    between them, and so many replicas were too few for this load, whatever the capacity says.
    """
    if seen.ready != state.ready:
        return replace(state, ready=seen.ready, ready_since_s=now_s)
    share = state.share + (1.0 - state.share) * min(1.0, elapsed_s / settings.doubt_s)
    full_s = seen.ready * state.capacity_s
    steady = now_s - state.ready_since_s > WINDOW_S
    if steady and full_s > 0 and seen.lost_rows_s > settings.tolerated_share * seen.arriving_rows_s:
        lost_share = seen.lost_rows_s / seen.arriving_rows_s
        good_for = _level_s(state) / full_s / (1.0 + lost_share)
        share = min(share, max(good_for, settings.worst_share))
    return replace(state, share=share)


def _level_s(state: State) -> float:
    recent = state.rates[-_LEVEL_STEPS:]
    return sum(recent) / len(recent)


def idle(settings: Settings, state: State, now_s: float) -> bool:
    """Whether nothing has been there to be done for a while."""
    return now_s - state.busy_s >= settings.idle_s


def hold(
    wanted: tuple[tuple[float, int], ...], now_wanted: int, now_s: float, hold_s: float
) -> tuple[tuple[tuple[float, int], ...], int]:
    """What to remember of what was wanted, and the most of it within `hold_s`."""
    kept = [(at, n) for at, n in wanted if now_s - at < hold_s and n > now_wanted]
    kept.append((now_s, now_wanted))
    return tuple(kept), kept[0][1]


def _held(settings: Settings, state: State, wanted: int, now_s: float) -> tuple[State, int]:
    """More is taken at once. Zero isn't held: it is wanted only after `idle_s`, which the user has said."""
    if wanted == 0:
        return replace(state, wanted=()), 0
    hold_s = max(settings.hold_least_s, settings.hold_cold_starts * state.starts.cold_start_s)
    kept, most = hold(state.wanted, wanted, now_s, hold_s)
    return replace(state, wanted=kept), most


def _bounded(settings: Settings, replicas: float) -> int:
    return int(min(max(replicas, settings.least), settings.most))
