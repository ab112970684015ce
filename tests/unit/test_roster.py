"""The coordinator's state machine: by hand for what has a name, and through simulated schedules of faults."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_crew import World

from cluster.errors import BadInput, RunFailed, StorageError
from training.crew.messages import Beat, Failed, Joined, Parted, Ready, error_fields
from training.crew.roles import End, Exit, Hire, Kill, Note, Outcome, Rules, Seat, Tell
from training.crew.roster import Roster

RULES = Rules(run="r", attempt="a", min_workers=1, max_workers=3, max_failures=50, same_step_failures=50)
NODES = {"n0": 2, "n1": 1}


def world(seed: int = 0, steps: int = 60, nodes: dict[str, int] = NODES, **rules: Any) -> World:
    return World(Rules(**{f: getattr(RULES, f) for f in RULES.__slots__} | rules), nodes, steps, seed)


def at(world: World, when_s: float, act: Any) -> None:
    world.after(when_s, act)


def kill(world: World, rank: int) -> None:
    for process in world.processes.values():
        if process.alive and process.active and process.rank == rank:
            world.die(process)
            return


def events(world: World, name: str) -> list[dict]:
    return [dict(record.fields) for record in world.records if record.event == name]


def test_an_undisturbed_run_has_one_generation() -> None:
    w = world()
    w.run(200)
    assert w.end == Outcome(60, 1.0)
    assert [e["world"] for e in events(w, "generation-started")] == [3]


def test_a_killed_worker_is_replaced_and_the_others_keep_their_state() -> None:
    w = world()
    at(w, 15, lambda: kill(w, 1))
    w.run(200)
    assert isinstance(w.end, Outcome)
    assert [e["source"] for e in events(w, "generation-started")] == ["fresh", "memory"]
    (lost,) = events(w, "member-lost")
    assert (lost["rank"], lost["how"]) == (1, "SIGKILL")
    assert len(w.processes) == 4
    assert w.redone <= 1


def test_a_silent_worker_is_killed_and_replaced() -> None:
    w = world()
    at(w, 15, lambda: w.freeze(next(p for p in w.processes.values() if p.rank == 2)))
    w.run(200)
    assert isinstance(w.end, Outcome)
    (lost,) = events(w, "member-lost")
    assert lost["how"].startswith("silent for 8 s")
    assert w.redone <= 1


def test_a_worker_that_hangs_while_it_beats_is_found_by_its_progress() -> None:
    w = world(stuck_s=20)

    def hang() -> None:
        next(p for p in w.processes.values() if p.rank == 2).hung = True

    at(w, 15, hang)
    w.run(300)
    assert isinstance(w.end, Outcome)
    (lost,) = events(w, "member-lost")
    assert (lost["rank"], lost["how"].partition(" for")[0]) == (2, "stuck in a step")


def test_a_loan_shrinks_the_group_and_its_end_grows_it() -> None:
    w = world(steps=150)
    at(w, 15, lambda: w.obey(w.roster.lend(1, 30, w.now_s)))
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert next((e["from"], e["to"]) for e in events(w, "resize")) == (3, 2)
    assert events(w, "generation-started")[-1]["world"] == 3
    assert events(w, "returned")
    assert w.redone <= 1
    assert events(w, "member-lost") == []


@pytest.mark.parametrize("seed", range(8))
def test_a_loan_shorter_than_its_handing_over_resizes_the_group_twice_and_no_more(seed: int) -> None:
    w = world(seed=seed, steps=150)
    w.slow_s = 6.0
    at(w, 15, lambda: w.obey(w.roster.lend(1, 0.5, w.now_s)))
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert [(e["from"], e["to"]) for e in events(w, "resize")] == [(3, 2), (2, 3)]
    assert [r.event for r in w.records if r.event in ("lent", "returned")] == ["lent", "returned"]
    assert w.redone <= 1


@pytest.mark.parametrize("after_s", [0.01, 0.3, 1.0, 2.0, 4.0, 8.0, 12.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_loan_taken_back_at_any_moment_disturbs_the_group_at_most_once_each_way(
    seed: int, after_s: float
) -> None:
    w = world(seed=seed, steps=150)
    w.slow_s = 4.0
    at(w, 15, lambda: w.obey(w.roster.lend(1, 600, w.now_s)))
    at(w, 15 + after_s, lambda: w.obey(w.roster.take_back(w.now_s)))
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert [(e["from"], e["to"]) for e in events(w, "resize")] in ([], [(3, 2), (2, 3)])
    told = [r.event for r in w.records if r.event in ("lent", "returned")]
    assert told in ([], ["lent", "returned"])
    assert events(w, "generation-started")[-1]["world"] == 3


def test_a_loan_is_counted_from_when_what_is_lent_is_free() -> None:
    w = world(steps=400)
    w.slow_s = 5.0
    at(w, 15, lambda: w.obey(w.roster.lend(1, 20, w.now_s)))
    held: list[tuple[float, int]] = []

    def look() -> None:
        held.append((w.now_s, len(w.roster.seats)))
        w.after(0.25, look)

    at(w, 15, look)
    w.run(300)
    free = [now_s for now_s, seats in held if seats == 2]
    assert 20 <= free[-1] - free[0] < 20 + 2 + 10, "and then it takes a while to hold it again"


def test_a_late_word_of_a_group_that_is_gone_changes_nothing() -> None:
    w = world(steps=100)
    at(w, 15, w.lose_attendant)
    w.run(30)
    seats = w.roster.seats
    late = Seat("group1", 0, 1, "n0", "127.0.0.1", ("d0",))
    w.obey(w.roster.seat_taken(late, w.now_s))
    assert w.roster.seats == seats


def test_a_loan_below_the_minimum_is_refused() -> None:
    w = world(min_workers=2, steps=100)
    w.run(15)
    with pytest.raises(BadInput, match="can't lend"):
        w.roster.lend(2, 60, w.now_s)
    w.roster.lend(1, 60, w.now_s)
    with pytest.raises(BadInput, match="already"):
        w.roster.lend(1, 60, w.now_s)


def test_room_that_appears_is_used() -> None:
    w = world(steps=120)
    w.taken = {"n1": 1}
    at(w, 20, w.taken.clear)
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert [e["world"] for e in events(w, "generation-started")] == [2, 3]
    assert w.redone <= 1


def test_nothing_is_waited_for_on_a_node_that_is_gone() -> None:
    w = world(steps=120, nodes={"n0": 1, "n1": 1}, min_workers=1, max_workers=2)
    w.slow_s = 60  # Ray Train takes its time to give up the seat there
    at(w, 75, lambda: w.lose_node("n1"))
    found: list[dict[str, Any]] = []
    at(w, 79, lambda: found.append(w.roster.summary(w.now_s)))
    w.run(400)
    assert isinstance(w.end, Outcome)
    assert (found[0]["world"], found[0]["phase"]) == (1, "training")


def test_those_who_can_go_on_do_not_wait_for_a_keeper_that_was_lost() -> None:
    w = world(steps=120, nodes={"n0": 1, "n1": 1}, min_workers=1, max_workers=2)
    found: list[dict[str, Any]] = []
    at(w, 40, lambda: w.lose_keeper("n1"))
    at(w, 41.2, lambda: found.append(w.roster.summary(w.now_s)))
    w.run(400)
    assert isinstance(w.end, Outcome)
    assert (found[0]["world"], found[0]["phase"]) == (1, "training")
    assert [e["world"] for e in events(w, "generation-started")] == [2, 1, 2]
    assert [e["source"] for e in events(w, "generation-started")][1:] == ["memory", "memory"]


def test_a_draining_node_is_left_with_a_checkpoint() -> None:
    w = world(steps=120)

    def drain() -> None:
        w.draining = frozenset({"n1"})

    at(w, 15, drain)
    at(w, 40, lambda: w.lose_node("n1"))
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert next(iter(w.pausing.values())) is True, "saved before it is left"
    assert events(w, "generation-started")[-1]["world"] == 2
    assert events(w, "member-lost") == []


def test_the_only_holder_of_the_state_carries_it_to_another_node() -> None:
    w = world(steps=80, nodes={"n0": 1, "n1": 1}, max_workers=1)

    def drain() -> None:
        w.draining = frozenset({"n0"})

    at(w, 15, drain)
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert w.redone <= 1
    assert [e["world"] for e in events(w, "generation-started")] == [1, 2, 1]


def test_the_loss_of_what_holds_the_resources_costs_the_training_nothing() -> None:
    w = world(steps=100)
    at(w, 15, w.lose_attendant)
    w.run(300)
    assert isinstance(w.end, Outcome)
    assert len(events(w, "generation-started")) == 1


def test_members_without_resources_stop_in_the_end_and_go_on_from_memory() -> None:
    w = world(steps=150)

    def lose() -> None:
        w.taken.update({"n0": 2, "n1": 1})
        w.lose_attendant()

    def give_back() -> None:
        w.taken = {}

    at(w, 15, lose)
    at(w, 80, give_back)
    w.run(400)
    assert isinstance(w.end, Outcome)
    assert w.redone <= 1
    assert len(events(w, "generation-started")) == 2


def test_failures_without_a_checkpoint_in_between_end_the_run() -> None:
    w = world(steps=10_000, max_failures=2)
    w.total_steps = 10_000
    for n in range(3):
        at(w, 6 + 0.9 * n, lambda: [w.die(p) for p in list(w.processes.values()) if p.alive])
    w.run(300)
    assert isinstance(w.end, RunFailed)
    assert "max_failures: 2" in w.end.allowed


class Driven:
    """A roster of one worker, driven by hand."""

    def __init__(self, **rules: Any) -> None:
        self.roster = Roster(
            Rules(**{f: getattr(RULES, f) for f in RULES.__slots__} | {"max_workers": 1} | rules), 0.0
        )
        self.member = ""
        self.generation = 0
        self.now_s = 0.0
        self.take(self.roster.keeper_up("n", 0))
        self.take(self.roster.seat_taken(Seat("g", 0, 1, "n", "ip"), 0))

    def take(self, decisions: list) -> list:
        for decision in decisions:
            if isinstance(decision, Hire):
                self.member = decision.member
            if isinstance(decision, Tell) and hasattr(decision.order, "attempt"):
                self.generation = decision.order.generation
        return decisions

    def hear(self, saying: Any) -> list:
        self.now_s += 0.1
        return self.take(self.roster.heard(self.member, saying, self.now_s))

    def train(self, step: int = 0) -> list:
        self.hear(Ready(pid=1))
        return self.hear(Joined(generation=self.generation, step=step, source="fresh"))


def test_an_error_that_retrying_cannot_mend_ends_the_run_as_it_is() -> None:
    crew = Driven()
    crew.train()
    error = BadInput("the label is not in the data", got="'y'")
    said = Failed(generation=crew.generation, error=error_fields(error), retryable=False)
    (end,) = [d for d in crew.hear(said) if isinstance(d, End)]
    assert isinstance(end.outcome, BadInput)
    assert end.outcome.parts() == error.parts()
    assert crew.roster.over


def test_the_same_step_failing_three_times_ends_the_run() -> None:
    crew = Driven(same_step_failures=3)
    out: list = []
    for _ in range(3):
        crew.train(step=7)
        crew.now_s += 0.1
        out = crew.take(crew.roster.exited(crew.member, Exit(1), crew.now_s))
    (end,) = [d for d in out if isinstance(d, End)]
    assert isinstance(end.outcome, RunFailed)
    assert "3 times in a row after step 7" in end.outcome.failed
    assert "exit code 1" in end.outcome.got


def test_people_are_told_who_was_lost_how_and_from_where_it_goes_on() -> None:
    crew = Driven()
    crew.train()
    crew.now_s += 1
    crew.take(crew.roster.exited(crew.member, Exit(-9, out_of_memory=True), crew.now_s))
    notes = [d.text for d in crew.train(step=412) if isinstance(d, Note)]
    assert notes == ["worker 0 was lost (out of memory on node n); going on from step 412, from the start"]


def test_what_is_said_of_a_generation_that_has_passed_is_ignored() -> None:
    crew = Driven()
    crew.train()
    assert crew.hear(Parted(generation=crew.generation - 1, step=1, why="late")) == []
    assert crew.roster.summary(crew.now_s)["phase"] == "training"


def test_a_coordinator_that_stood_still_itself_blames_nobody() -> None:
    crew = Driven()
    crew.train()
    crew.roster.tick(1.0)
    assert not [d for d in crew.roster.tick(60.0) if isinstance(d, Kill)]
    assert not [d for d in crew.roster.tick(60.5) if isinstance(d, Kill)]


def put_off(crew: Driven) -> list:
    """Its start fails for want of the store."""
    error = error_fields(StorageError("the store doesn't answer", got="s3://b"))
    return crew.hear(Failed(generation=crew.generation, error=error, retryable=True))


def next_try(crew: Driven) -> list:
    """Everything decided until the next generation, of a process that lives and holds its seat."""
    decided: list = []
    generation, until_s = crew.generation, crew.now_s + 60
    while crew.generation == generation and crew.now_s < until_s:
        crew.now_s += 0.25
        crew.take(crew.roster.seat_taken(Seat("g", 0, 1, "n", "ip"), crew.now_s))
        beat = Beat(generation=generation, step=0, progress=0, waiting=False, phase="waiting")
        decided += crew.take(crew.roster.heard(crew.member, beat, crew.now_s))
        decided += crew.take(crew.roster.tick(crew.now_s))
    return decided


def test_starts_that_fail_for_want_of_the_store_are_spaced_and_not_held_against_the_run() -> None:
    crew = Driven(max_failures=0, retry_s=600.0)
    crew.hear(Ready(pid=1))
    tries_s = []
    while crew.now_s < 300:
        tries_s.append(crew.now_s)
        (note,) = [d.text for d in put_off(crew) if isinstance(d, Note)]
        assert note.startswith("worker 0 failed: the store doesn't answer")
        assert not [d for d in next_try(crew) if isinstance(d, Kill | End | Hire)]
    pauses_s = [b - a for a, b in itertools.pairwise(tries_s)]
    assert 8 < len(tries_s) < 30
    assert pauses_s[0] < 2
    assert all(14 < pause_s < 31 for pause_s in pauses_s[6:])
    crew.hear(Joined(generation=crew.generation, step=0, source="fresh"))
    assert crew.roster.summary(crew.now_s)["phase"] == "training"
    assert crew.roster.summary(crew.now_s)["failures"] == 0


def test_a_store_that_stays_out_of_reach_ends_the_run_with_its_own_error() -> None:
    crew = Driven(retry_s=60.0)
    crew.hear(Ready(pid=1))
    ends: list[End] = []
    while not ends and crew.now_s < 200:
        ends = [d for d in put_off(crew) if isinstance(d, End)]
        if not ends:
            next_try(crew)
    assert isinstance(ends[0].outcome, StorageError)
    assert 60 <= crew.now_s < 63


FAULTS = ("kill", "freeze", "hang", "keeper", "attendant", "lend", "take", "kill-all", "node")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    faults=st.lists(st.tuples(st.floats(2, 80), st.sampled_from(FAULTS), st.integers(0, 5)), max_size=8),
)
def test_whatever_happens_the_run_ends_well_and_memory_is_not_thrown_away(
    seed: int, faults: list[tuple[float, str, int]]
) -> None:
    w = world(seed=seed, steps=120, nodes={"n0": 2, "n1": 2}, stuck_s=15)

    def strike(what: str, which: int) -> None:
        alive = [p for p in w.processes.values() if p.alive]
        if what == "kill-all":
            for process in alive:
                w.die(process)
        elif what in ("kill", "freeze", "hang") and alive:
            process = alive[which % len(alive)]
            if what == "kill":
                w.die(process)
            elif what == "freeze":
                process.frozen = True
            else:
                process.hung = True
        elif what == "keeper":
            w.lose_keeper(f"n{which % 2}")
        elif what == "attendant":
            w.lose_attendant()
        elif what == "lend":
            with contextlib.suppress(BadInput):
                w.obey(w.roster.lend(1 + which % 2, 20, w.now_s))
        elif what == "take":
            w.taken = {"n0": which % 2}
            w.after(10, w.taken.clear)
        elif what == "node" and len(w.nodes) > 1:
            w.lose_node("n1")

    for when_s, what, which in faults:
        w.after(when_s, lambda what=what, which=which: strike(what, which))
    w.run(1500)
    assert isinstance(w.end, Outcome), w.roster.summary(w.now_s)
    assert w.end.steps == 120
