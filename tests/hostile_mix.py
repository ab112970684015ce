"""Attacks of all kinds without end, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import hostile_bodies as bodies
import hostile_heads as heads
from hostile import Attack, Target, common

_MAKERS = (
    *(bodies.json_body, bodies.json_body, bodies.json_body, bodies.binary, bodies.binary, bodies.image),
    *(heads.headers, heads.headers, heads.path, heads.framing, heads.pipeline, heads.garbage),
)


def attacks(dice: random.Random, targets: Sequence[Target], key: str = "") -> Iterator[Attack]:
    """Attacks without end.

    Args:
        key: an API key that most of them carry; empty where the service asks for none.
    """
    while True:
        maker = dice.choice(_MAKERS)
        attack = maker(dice, dice.choice(targets), common(dice, key))
        yield _delivered(dice, attack)


def _delivered(dice: random.Random, attack: Attack) -> Attack:
    """The same bytes, perhaps in another way: cut off, in pieces, or by a client that leaves."""
    if attack.ending != "await" or len(attack.pieces) > 1:
        return attack
    (whole,) = attack.pieces
    luck = dice.random()
    if luck < 0.06:
        cut = whole[: dice.randrange(1, len(whole))]
        return replace(attack, pieces=(cut,), ending=dice.choice(("half-close", "close", "reset")))
    if luck < 0.10:
        return replace(attack, ending=dice.choice(("close", "reset")))
    if luck < 0.20:
        cuts = sorted(dice.randrange(len(whole) + 1) for _ in range(dice.randrange(1, 5)))
        ends = zip([0, *cuts], [*cuts, len(whole)], strict=True)
        return replace(attack, pieces=tuple(whole[a:b] for a, b in ends), pause_s=0.01)
    return attack
