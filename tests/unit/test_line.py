"""A line tells what was consumed, and what was left out, at whatever moment it is asked."""

from __future__ import annotations

import torch

from training.checkpoints.checkpoint import CheckpointMeta
from training.line import Line
from training.loop import TrainState

START = CheckpointMeta(step=5, cursor=40, fingerprint="f", ledger=())


def at(step: int, cursor: int) -> TrainState:
    model = torch.nn.Linear(1, 1)
    return TrainState(model, torch.optim.SGD(model.parameters()), step, cursor)


def ranges(meta: CheckpointMeta) -> list[tuple[int, int, bool]]:
    return [(s.start, s.stop, s.skipped) for s in meta.ledger]


def test_a_batch_that_is_left_out_is_on_record_as_soon_as_the_state_is_past_it() -> None:
    """The group may break before anybody hears of the step."""
    line = Line(START, {56: 64}, "a", 2)
    assert ranges(line.to(at(7, 56))) == [(40, 56, False)]
    assert ranges(line.to(at(8, 64))) == [(40, 56, False), (56, 64, True)]
    meta = line.to(at(9, 72), loss=1.0)
    assert ranges(meta) == [(40, 56, False), (56, 64, True), (64, 72, False)]
    assert (meta.step, meta.cursor, meta.loss) == (9, 72, 1.0)


def test_what_an_earlier_group_left_out_is_told_once() -> None:
    meta = Line(START, {48: 56}, "a", 2).to(at(8, 64))
    line = Line(meta, {48: 56}, "b", 3)
    assert ranges(line.to(at(9, 72))) == [(40, 48, False), (48, 56, True), (56, 64, False), (64, 72, False)]
    assert line.left_out == 1


def test_going_back_takes_up_the_earlier_line_and_leaves_the_batch_out_when_it_comes() -> None:
    line = Line(START, {}, "a", 2)
    assert ranges(line.to(at(9, 72))) == [(40, 72, False)]
    line.back_to(START, 56, 64)
    assert line.is_skipped(56)
    assert not line.is_skipped(48)
    assert ranges(line.to(at(9, 72))) == [(40, 56, False), (56, 64, True), (64, 72, False)]
    assert line.left_out == 1
