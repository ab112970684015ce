"""What the evidence says of a candidate: go on, a step further, promote, abandon. Pure.

A candidate is abandoned when it is worse with a confidence that holds though it is looked at every second
or two: bounds lie three standard deviations out (about one false alarm in a thousand looks), from
Wilson's interval for shares (Wilson, "Probable inference", JASA 1927), which is honest at few requests and
at shares near 0, and from the normal distribution for means. Nothing is concluded from few numbers, so a
version without a fault isn't abandoned for one slow answer.

It goes a step further when the step has lasted its time, the candidate has had its number of requests, and
nothing speaks against it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from cluster.trial import Rules, Trial
from serving.rollout.evidence import Evidence, Scores, Side

_DEVIATIONS = 3.0
_LEAST_TIMES = 50
"""Batches of the other version from which its times are taken for known."""
_LEAST_FAILURES = 3
_LEAST_SLOW = 5
"""One batch alone, if slow, would speak against it at any odds."""
_LEAST_SCORES = 20
_TAIL = 0.05

Action = Literal["go on", "advance", "promote", "wait", "abandon"]


class Verdict(NamedTuple):
    """What to do, and why, in words for the log."""

    action: Action
    why: str


def judge(trial: Trial, evidence: Evidence, lasted_s: float) -> Verdict:
    """The verdict on a step of a trial.

    Args:
        trial: as it stands in the log.
        evidence: all that was seen in this step.
        lasted_s: how long the step has lasted.
    """
    rules = trial.rules
    against = _against(rules, evidence)
    if against is not None:
        return Verdict("abandon", against)
    given = evidence.candidate.requests
    if lasted_s < rules.hold_s or given < rules.least_requests:
        return Verdict("go on", f"{given} requests in {lasted_s:.0f} s")
    held = f"held at {trial.percent:g}% over {given} requests"
    if not trial.is_last_step:
        return Verdict("advance", held)
    return Verdict("promote" if rules.then == "promote" else "wait", held)


def _against(rules: Rules, evidence: Evidence) -> str | None:
    """The first thing that speaks against the candidate."""
    if evidence.broken is not None:
        return f"it can't be loaded: {evidence.broken}"
    stable, candidate = evidence.stable, evidence.candidate
    return (
        _more_failures(rules, stable, candidate)
        or _slower(rules, stable, candidate)
        or _lower_scores(rules, stable.scores, candidate.scores)
        or _other_answers(rules, evidence)
    )


def _more_failures(rules: Rules, stable: Side, candidate: Side) -> str | None:
    # Where the candidate gets every request, there is nothing to compare with but no failures at all.
    usual = wilson(stable.failed, stable.requests)[1] if stable.requests else 0.0
    allowed = usual + rules.error_margin
    few = candidate.failed < _LEAST_FAILURES
    if few or wilson(candidate.failed, candidate.requests)[0] <= allowed:
        return None
    return (
        f"{candidate.failed} of {candidate.requests} requests failed, against {stable.failed} of"
        f" {stable.requests} (a share of {allowed:.3f} is allowed)"
    )


def _slower(rules: Rules, stable: Side, candidate: Side) -> str | None:
    if stable.times.total() < _LEAST_TIMES:
        return None
    limit = stable.quantile(1 - _TAIL) * rules.latency_ratio
    slow, answered = candidate.slower_than(limit), candidate.times.total()
    # As slow as allowed, it would have a share of `_TAIL` above the limit.
    if slow < _LEAST_SLOW or wilson(slow, answered)[0] <= _TAIL:
        return None
    return (
        f"{slow} of {answered} batches took more than {limit:.2f} times as long as the version in service"
        f" usually takes, which is {rules.latency_ratio:g} times the 95th percentile of its own"
    )


def _lower_scores(rules: Rules, stable: Scores, candidate: Scores) -> str | None:
    if min(stable.count, candidate.count) < _LEAST_SCORES:
        return None
    gap = stable.mean - candidate.mean
    uncertain = _DEVIATIONS * math.sqrt(stable.variance_of_mean + candidate.variance_of_mean)
    if gap - uncertain <= rules.score_margin:
        return None
    return (
        f"its mean score is {candidate.mean:.3f} over {candidate.count} answers,"
        f" against {stable.mean:.3f} over {stable.count}"
    )


def _other_answers(rules: Rules, evidence: Evidence) -> str | None:
    if rules.disagreement is None:
        return None
    if wilson(evidence.differed, evidence.compared)[0] <= rules.disagreement:
        return None
    return f"{evidence.differed} of {evidence.compared} rows were answered otherwise"


def wilson(hits: int, tries: int) -> tuple[float, float]:
    """The interval that a share surely lies in, given `hits` in `tries`; (0, 1) where there are none."""
    if tries == 0:
        return 0.0, 1.0
    share, z2 = hits / tries, _DEVIATIONS**2
    middle = (share + z2 / (2 * tries)) / (1 + z2 / tries)
    half = _DEVIATIONS / (1 + z2 / tries) * math.sqrt(share * (1 - share) / tries + z2 / (4 * tries**2))
    return max(0.0, middle - half), min(1.0, middle + half)
