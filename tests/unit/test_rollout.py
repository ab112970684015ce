"""Canary and shadow: exact shares, evidence that adds up, verdicts that neither jump nor sleep."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import memory_store
from cluster.trial import Rules, Trial
from serving.rollout.evidence import Evidence, Side
from serving.rollout.judge import judge, wilson
from serving.rollout.pool import Pool
from serving.rollout.split import Split

QUICK = Rules(hold_s=10, least_requests=100)


def a_trial(rules: Rules = QUICK, step: int = 0) -> Trial:
    return Trial(version=2, mode="canary", steps=(1, 50), step=step, rules=rules, began=5, stepped=5 + step)


@given(st.floats(0.1, 100), st.integers(1, 4), st.integers(0, 10_000))
def test_the_share_is_exact_on_every_replica(percent: float, replicas: int, requests: int) -> None:
    splits = [Split(percent, start=number / replicas) for number in range(replicas)]
    taken = sum(splits[number % replicas].takes() for number in range(requests))
    assert abs(taken - requests * percent / 100) <= replicas


def test_callers_stay_with_their_version_and_shares_nest() -> None:
    callers = [f"session-{number}".encode() for number in range(20_000)]
    small, large = Split(10, salt=b"7"), Split(50, salt=b"7")
    in_small = {caller for caller in callers if small.takes(caller)}
    in_large = {caller for caller in callers if large.takes(caller)}
    assert in_small == {caller for caller in callers if Split(10, salt=b"7").takes(caller)}
    assert in_small < in_large
    assert abs(len(in_small) - 2_000) < 200
    other = {caller for caller in callers if Split(10, salt=b"8").takes(caller)}
    assert len(in_small & other) < 400
    assert all(Split(100).takes(caller) for caller in callers[:100])


def test_a_quantile_is_known_within_a_tenth() -> None:
    side = Side()
    for number in range(1, 1001):
        side.took(number / 1000)
    assert 0.95 <= side.quantile(0.95) <= 0.95 * 1.1
    assert side.slower_than(2.0) == 0
    assert side.slower_than(0.0001) == 1000
    assert 1000 - side.slower_than(0.5) == pytest.approx(500, abs=50)
    assert Side().quantile(0.5) == 0


counts = st.integers(0, 50)


@given(st.lists(st.tuples(counts, counts, st.lists(st.floats(0, 1), max_size=5)), min_size=2, max_size=4))
def test_evidence_adds_up_through_the_store(parts: list[tuple[int, int, list[float]]]) -> None:
    pool = Pool(memory_store(), "digits", a_trial())
    whole = Evidence()
    for number, (answered, failed, scores) in enumerate(parts):
        seen = Evidence(compared=answered, differed=min(answered, failed))
        for side in (seen.candidate, whole.candidate):
            for count in range(answered):
                side.answered()
                side.took(0.001 * (1 + count))
            for _ in range(failed):
                side.broke()
            for score in scores:
                side.scores.add(score)
        whole.compared += seen.compared
        whole.differed += seen.differed
        pool.give(f"replica-{number}", Evidence())
        pool.give(f"replica-{number}", seen)
    found = pool.together(pool.replicas())
    assert len(pool.replicas()) == len(parts)
    assert found.candidate.requests == whole.candidate.requests
    assert found.candidate.times == whole.candidate.times
    assert found.candidate.scores.mean == pytest.approx(whole.candidate.scores.mean)
    assert (found.compared, found.differed) == (whole.compared, whole.differed)


def test_what_cant_be_read_is_passed_over() -> None:
    store = memory_store()
    pool = Pool(store, "digits", a_trial())
    pool.give("one", Evidence(compared=3))
    store.put(pool.replicas()[0].replace("one", "two"), b"not json")
    assert pool.together(pool.replicas()).compared == 3


def seen(candidate: Side, stable: Side | None = None) -> Evidence:
    return Evidence(stable=stable or good(1000), candidate=candidate)


def good(requests: int, failed: int = 0, slow: float = 1.0, seed: int = 1) -> Side:
    side, dice = Side(), random.Random(seed)
    for number in range(requests):
        if number < failed:
            side.broke()
        else:
            side.answered()
            side.took(slow * (0.5 + dice.random()))
    return side


def test_a_good_candidate_goes_its_steps() -> None:
    assert judge(a_trial(), seen(good(99)), 20).action == "go on"
    assert judge(a_trial(), seen(good(100)), 9).action == "go on"
    assert judge(a_trial(), seen(good(100)), 10).action == "advance"
    assert judge(a_trial(step=1), seen(good(100)), 10).action == "promote"
    waiting = QUICK.model_copy(update={"then": "wait"})
    assert judge(a_trial(waiting, step=1), seen(good(100)), 10).action == "wait"


def test_a_failing_candidate_is_abandoned_within_few_requests() -> None:
    assert judge(a_trial(), seen(good(2, failed=2)), 0).action == "go on"
    assert judge(a_trial(), seen(good(3, failed=3)), 0).action == "abandon"
    assert judge(a_trial(), seen(good(3, failed=3), Side()), 0).action == "abandon"
    verdict = judge(a_trial(), seen(good(40, failed=12)), 1)
    assert verdict.action == "abandon"
    assert "12 of 40" in verdict.why


def test_one_failure_among_many_is_no_reason() -> None:
    assert judge(a_trial(), seen(good(100, failed=1)), 5).action == "go on"
    # As bad as the other is not worse.
    assert judge(a_trial(), seen(good(100, failed=20), good(1000, failed=200)), 20).action == "advance"


def test_a_slower_candidate_is_abandoned() -> None:
    assert judge(a_trial(), seen(good(60, slow=2.0)), 1).action == "abandon"
    assert judge(a_trial(), seen(good(60, slow=1.1)), 20).action == "go on"
    # Nothing to compare with says nothing, nor do a few slow answers.
    assert judge(a_trial(), seen(good(200, slow=50), good(10)), 20).action == "advance"
    assert judge(a_trial(), seen(good(4, slow=50)), 1).action == "go on"


def test_lower_scores_are_reason_enough() -> None:
    stable, candidate = good(500), good(500)
    for number in range(300):
        stable.scores.add(1.0 if number % 10 else 0.0)
        candidate.scores.add(1.0 if number % 2 else 0.0)
    verdict = judge(a_trial(), seen(candidate, stable), 1)
    assert verdict.action == "abandon"
    assert "0.500" in verdict.why


def test_a_shadow_may_differ_as_much_as_is_said() -> None:
    evidence = seen(good(500))
    evidence.compared, evidence.differed = 500, 100
    assert judge(a_trial(), evidence, 20).action == "advance"
    strict = QUICK.model_copy(update={"disagreement": 0.05})
    assert judge(a_trial(strict), evidence, 20).action == "abandon"
    lax = QUICK.model_copy(update={"disagreement": 0.3})
    assert judge(a_trial(lax), evidence, 20).action == "advance"


def test_what_cant_be_loaded_is_abandoned_at_once() -> None:
    verdict = judge(a_trial(), Evidence(broken="bad graph"), 0)
    assert (verdict.action, "bad graph" in verdict.why) == ("abandon", True)


def test_twins_are_rarely_abandoned_though_they_are_looked_at_all_the_time() -> None:
    abandoned = 0
    for seed in range(60):
        dice = random.Random(seed)
        evidence = Evidence()
        for number in range(2_000):
            side = evidence.candidate if number % 10 == 0 else evidence.stable
            if dice.random() < 0.02:
                side.broke()
            else:
                side.answered()
                side.took(dice.lognormvariate(0, 0.5))
            if number % 50 == 0 and judge(a_trial(), evidence, 0).action == "abandon":
                abandoned += 1
                break
    assert abandoned <= 3


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_interval_holds_the_share(hits: int, misses: int) -> None:
    low, high = wilson(hits, hits + misses)
    share = hits / (hits + misses) if hits + misses else 0.5
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
