"""Which process takes which seat: a pure function of the seats and of the processes there are.

A process that runs already is worth most, then one that still holds state, then one that is at least
started; only what is left is hired. If the most advanced state would be left without a seat, the process
that holds it joins as a *bearer*, so that the others get it from its memory; it leaves right after.

Knows neither Ray nor time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.crew.roles import Member, Seat


@dataclass(frozen=True, slots=True)
class Cast:
    """Seats by rank, each with the process that takes it; None where one has to be hired."""

    seated: tuple[tuple[Seat, str | None], ...]
    bearer: tuple[Seat, str] | None = None

    @property
    def missing(self) -> list[Seat]:
        """Seats for which nobody is there yet."""
        return [seat for seat, name in self.seated if name is None]

    @property
    def names(self) -> list[str]:
        """Those who take part, by rank, the bearer last; complete only if nobody is missing."""
        named = [name for _, name in self.seated if name is not None]
        return [*named, self.bearer[1]] if self.bearer else named


def cast(seats: Sequence[Seat], members: Mapping[str, Member], limit: int) -> Cast:
    """Fill at most `limit` of the seats.

    Args:
        seats: of one group, all usable.
        members: by name; those told to leave, or killed, take no seat.
        limit: how many workers the run may have now, at least 1.
    """
    free = sorted((m for m in members.values() if m.doomed_s is None), key=_worth)
    pairs: list[tuple[Seat, Member | None]] = []
    for seat in sorted(seats, key=lambda seat: seat.rank):
        taker = next((m for m in free if (m.node, m.devices) == (seat.node, seat.devices)), None)
        if taker is not None:
            free.remove(taker)
        pairs.append((seat, taker))
    kept = sorted(pairs, key=lambda pair: (_worth(pair[1]) if pair[1] else (True,), pair[0].rank))[:limit]
    kept.sort(key=lambda pair: pair[0].rank)
    seated = tuple((seat, taker.name if taker else None) for seat, taker in kept)
    seated_step = max((m.step for _, m in kept if m is not None and m.warm), default=-1)
    ahead = [m for m in members.values() if m.warm and m.doomed_s is None and m.step > seated_step]
    if not ahead or not kept:
        return Cast(seated)
    # Its address is never asked for: it comes last, and rank 0 is who is connected to.
    return Cast(seated, (kept[0][0], max(ahead, key=lambda m: m.step).name))


def _worth(member: Member) -> tuple[bool, bool, int, bool, float]:
    """Smaller is better."""
    return (
        member.generation is None,
        not member.warm,
        -member.step,
        not member.ready,
        member.hired_s,
    )
