"""500 faults against checkpoints: no bad load, always a fallback, training alive. `make chaos`.

Real trainers (two ranks, killed with SIGKILL), their real uploaders, a real S3 server, and a proxy that
breaks what passes. The seed is in the test's name. `tests/checkpoint_faults.py` says what is checked.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_faults import PUTS_A_SAVE, Campaign, until
from fault_proxy import Fault, FaultProxy, Kind
from saving_trainer import Nursery
from seaweed import Seaweed

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

HOLDS = (Kind.HOLD_REQUEST, Kind.HOLD_BODY, Kind.HOLD_RESPONSE)
VICTIMS: tuple[tuple[int, ...], ...] = ((), (0,), (1,))
"""Everyone, or one rank, whose peer dies with the group."""
STORM_S = float(os.environ.get("TANDEM_CHAOS_STORM_S", "300"))
DONE: Counter[str] = Counter()
LOADS: list[int] = []


@pytest.fixture(scope="module")
def server() -> Iterator[Seaweed]:
    with Seaweed() as server:
        yield server


@pytest.fixture(scope="module")
def nursery(server: Seaweed) -> Iterator[Nursery]:
    with Nursery(server.env) as nursery:
        yield nursery


@pytest.fixture
def campaign(
    server: Seaweed,
    nursery: Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Campaign]:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    with FaultProxy(server.endpoint, seed=1) as proxy:
        campaign = Campaign(server, proxy, nursery, tmp_path, name)
        yield campaign
    DONE.update(campaign.faults)
    LOADS.append(campaign.loads)


@pytest.fixture(scope="module", autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    counts = {**dict(sorted(DONE.items())), "loads compared bit for bit": sum(LOADS)}
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stderr.write("\n" + json.dumps(counts, indent=1) + "\n")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", HOLDS)
def test_killed_at_every_upload_boundary(campaign: Campaign, kind: Kind, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    for put in range(PUTS_A_SAVE):
        for _ in range(2):
            campaign.kill_at(put, kind, rng.choice(VICTIMS))


@pytest.mark.parametrize(
    ("how", "rounds"), [("truncation", 60), ("bit flip", 60), ("lost shard", 60), ("lost manifest", 30)]
)
def test_damaged_in_the_store(campaign: Campaign, how: str, rounds: int) -> None:
    rng = random.Random(how)
    with campaign.training() as group:
        campaign.commits(group)
        campaign.commits(group, 6)
    for _ in range(rounds):
        campaign.damage(how, rng, newest=rng.choice([1, 1, 2, 3]))
    campaign.load()


@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.SHORTEN, Kind.CUT_RESPONSE, Kind.STATUS, Kind.TRICKLE])
def test_spoiled_on_the_way_to_the_reader(campaign: Campaign, kind: Kind) -> None:
    rng = random.Random(kind)
    with campaign.training() as group:
        campaign.commits(group)
        campaign.commits(group, 3)
    for _ in range(12):
        fault = Fault(
            kind,
            method="GET",
            key=r"safetensors$|layout\.json$",
            after=rng.randrange(3),
            at_byte=rng.randrange(50_000),
            bytes_per_s=200_000,
        )
        campaign.spoil_a_load(fault)


@pytest.mark.parametrize(
    "kind",
    [Kind.STATUS, Kind.CUT_REQUEST, Kind.CUT_RESPONSE, Kind.LOST_RESPONSE, Kind.DELAY, Kind.TRICKLE],
)
def test_trouble_on_the_way_to_the_store(campaign: Campaign, kind: Kind) -> None:
    rng = random.Random(kind)
    with campaign.training() as group:
        campaign.commits(group)
        for _ in range(18):
            fault = Fault(
                kind,
                method="PUT",
                key="/checkpoints/",
                after=rng.randrange(PUTS_A_SAVE),
                times=rng.randint(1, 3),
                at_byte=rng.randrange(60_000),
                bytes_per_s=300_000,
            )
            campaign.trouble_while_saving(group, fault)
    campaign.load()


@pytest.mark.parametrize("kind", [Kind.HOLD_REQUEST, Kind.HOLD_RESPONSE])
def test_a_stale_writer_wakes(campaign: Campaign, kind: Kind) -> None:
    for put in [*range(PUTS_A_SAVE), PUTS_A_SAVE - 1]:
        campaign.stale_writer(put, kind)


def test_a_storm_of_503s(campaign: Campaign) -> None:
    """Five minutes; TANDEM_CHAOS_STORM_S for less."""
    campaign.storm(STORM_S, retry_s=600)


def test_a_storm_that_outlasts_the_patience(campaign: Campaign) -> None:
    campaign.storm(12, retry_s=4)


def test_a_server_that_is_gone(campaign: Campaign) -> None:
    with campaign.training() as group:
        campaign.commits(group)
        with campaign.proxy.down():
            steps = group.steps
            until_step = max(steps) + 400
            until(lambda: min(group.steps) > until_step, "stepping without a store")
        campaign.commits(group, 2)
        campaign.faults["server gone"] += 1
    campaign.load()
