"""A few of the faults of `tests/chaos/test_checkpoint_faults.py`, with real processes and the real server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_faults import Campaign
from fault_proxy import Fault, FaultProxy, Kind
from saving_trainer import Nursery
from seaweed import Seaweed


@pytest.fixture(scope="module")
def nursery(s3: Seaweed) -> Iterator[Nursery]:
    with Nursery(s3.env) as nursery:
        yield nursery


@pytest.fixture
def campaign(
    s3_env: Seaweed, nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Campaign]:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    with FaultProxy(s3_env.endpoint, seed=1) as proxy:
        yield Campaign(s3_env, proxy, nursery, tmp_path, name)


def test_killed_in_the_middle_of_a_save(campaign: Campaign) -> None:
    campaign.kill_at(0, Kind.HOLD_BODY, ())
    campaign.kill_at(5, Kind.HOLD_RESPONSE, (0,))  # the manifest's: the checkpoint stands, nobody was told


def test_damaged_checkpoints_are_passed_over_and_troubled_saves_made_up_for(campaign: Campaign) -> None:
    rng = random.Random(1)
    with campaign.training() as group:
        campaign.commits(group)
        for kind in (Kind.STATUS, Kind.CUT_REQUEST, Kind.LOST_RESPONSE):
            fault = Fault(kind, method="PUT", key="/checkpoints/", after=rng.randrange(6), at_byte=9000)
            campaign.trouble_while_saving(group, fault)
    for how in ("truncation", "bit flip", "lost shard"):
        campaign.damage(how, rng, newest=2)
    campaign.spoil_a_load(Fault(Kind.FLIP, method="GET", key="safetensors$", at_byte=30_000))


def test_a_stopped_driver_wakes_behind_its_successor(campaign: Campaign) -> None:
    campaign.stale_writer(5, Kind.HOLD_REQUEST)
