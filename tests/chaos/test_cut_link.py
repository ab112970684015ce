"""Two training processes in network namespaces of their own: the link between them is cut, and comes back.

Nothing is closed or reset, as when a cable is pulled: each waits for the other, and lives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_runs import STEPS, FaultyRun
from led_crew import LedCrew, Post

from cluster.clock import SYSTEM_CLOCK
from training.checks import prepare
from training.crew.roles import Outcome
from training.data.audit import audit

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]
WITHIN_S = 150
STUCK_S = 5.0


class Link:
    """A pair of namespaces and what joins them: `posts` are in them."""

    def __init__(self) -> None:
        self.names = [f"tandem{os.getpid()}{end}" for end in "ab"]
        self.cards = [f"t{os.getpid() % 100000}{end}" for end in "ab"]
        ip("link", "add", self.cards[0], "type", "veth", "peer", "name", self.cards[1])
        self.posts = []
        for number, (name, card) in enumerate(zip(self.names, self.cards, strict=True), 1):
            ip("netns", "add", name)
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", card)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", card, "up")
            within = ("ip", "netns", "exec", name)
            self.posts.append(Post(f"10.213.7.{number}", within, {"GLOO_SOCKET_IFNAME": card}))

    def set(self, state: str) -> None:
        """`up` or `down`."""
        ip("-n", self.names[0], "link", "set", self.cards[0], state)

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.cards[0]], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[Link]:
    try:
        link = Link()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield link
    link.close()


class Cutter:
    """Cuts the link once some steps are made, and mends it after a time, or when something was noticed."""

    def __init__(self, link: Link, case: FaultyRun, crew: LedCrew, for_s: float | None) -> None:
        self._link, self._case, self._crew, self._for_s = link, case, crew, for_s
        self.cut_s = self.mended_s = self.noticed_s = self.went_on_s = 0.0
        self._step = 0

    def __call__(self) -> None:
        now_s = time.monotonic()
        if not self.cut_s:
            if self._crew.step >= 20:
                self._link.set("down")
                self.cut_s = now_s
        elif not self.mended_s:
            if self._for_s is None:
                due = self._crew.phase not in ("training", "pausing")
            else:
                due = now_s - self.cut_s >= self._for_s
            if due:
                self.noticed_s = now_s
                self._link.set("up")
                self.mended_s, self._step = now_s, self._crew.step
        elif not self.went_on_s and self._crew.step > self._step:
            self.went_on_s = now_s
            self._case.hurry()


@pytest.mark.parametrize("for_s", [3.0, None], ids=["short", "until-noticed"])
def test_a_cut_link_is_noticed_and_nothing_is_lost(
    link: Link, tmp_path: Path, capsys: pytest.CaptureFixture[str], for_s: float | None
) -> None:
    case = FaultyRun(
        tmp_path,
        workers={"min": 2, "max": 2},
        faults={"silent_s": 5, "stuck_s": STUCK_S},
        checkpoint={"every_s": None, "every_steps": 100},
    )
    prepare(case.run, case.recipe, SYSTEM_CLOCK.wall())
    with LedCrew(case.recipe, case.run.record().facts, link.posts) as crew:
        cutter = Cutter(link, case, crew, for_s)
        end = crew.lead(WITHIN_S, cutter)
    assert isinstance(end, Outcome), end
    assert end.steps == STEPS
    sources = [r.fields["source"] for _, r in crew.records if r.event == "generation-started"]
    assert sources == (["fresh"] if for_s else ["fresh", "memory"])
    assert not [r for _, r in crew.records if r.event == "member-lost"]
    found = audit(case.run)
    assert not found.problems
    redone = case.steps_begun() - STEPS
    assert redone <= 1
    assert cutter.went_on_s, "the link was cut"
    with capsys.disabled():
        noticed = "not noticed" if for_s else f"noticed after {cutter.noticed_s - cutter.cut_s:.1f} s"
        sys.stdout.write(
            f"\nlink cut: {noticed}, mended after {cutter.mended_s - cutter.cut_s:.1f} s, next step "
            f"{cutter.went_on_s - cutter.mended_s:.1f} s later, {redone} redone, 0 rows missing or repeated\n"
        )
