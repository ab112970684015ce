"""How a request meets a trial: which version answers, what a failing candidate costs the caller (nothing),
and what the shadow is given.

A candidate that can't answer is not the caller's problem: the version in service answers instead, within
the same deadline, and the failure is counted against the candidate. Where the version in service can't
answer either, the request is to blame and nothing is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from cluster.errors import DeadlineExceeded, NotReady, Overloaded, TandemError
from serving.http import Request, Response
from serving.protocol.requests import Arrays
from serving.replica import Loaded, Replica
from serving.rollout.compare import rows_that_differ
from serving.rollout.feedback import Feedback
from serving.rollout.tried import Tried
from serving.waiting import ClientGone

logger = logging.getLogger("tandem.serving")

CALLER = b"x-session-id"
_NO_FAULT_OF_THE_VERSION = (ClientGone, Overloaded, NotReady, DeadlineExceeded)


async def answer_by_one(
    replica: Replica, request: Request, answer: Callable[[Loaded], Awaitable[Response]]
) -> Response:
    """The answer of the version in service, or of the candidate where it is its turn.

    Args:
        answer: parses, runs and renders by the version that it is given, which is leased.
    """
    tried = replica.tried
    candidate = tried.chosen(request.headers.get(CALLER)) if tried is not None else None
    if tried is None or candidate is None:
        with replica.lease() as loaded:
            return await _counted(tried, loaded, answer)
    try:
        with replica.lease(candidate):
            return await answer(candidate)
    except _NO_FAULT_OF_THE_VERSION:
        raise
    except Exception as error:  # noqa: BLE001 - a candidate may fail in any way
        cause = error
    with replica.lease() as loaded:
        response = await answer(loaded)
    tried.evidence.candidate.broke()
    replica.metrics.candidate_failed(candidate.name)
    logger.warning("request %s: candidate %s failed: %s", request.id, candidate.name, cause)
    return response


async def _counted(
    tried: Tried[Loaded] | None, loaded: Loaded, answer: Callable[[Loaded], Awaitable[Response]]
) -> Response:
    try:
        return await answer(loaded)
    except Exception as error:
        is_ours = not isinstance(error, TandemError | ClientGone)
        if tried is not None and is_ours:
            tried.evidence.stable.broke()
        raise


def shadow(replica: Replica, tried: Tried[Loaded], loaded: Loaded, inputs: Arrays, outputs: Arrays) -> None:
    """Give a shadow, where one is on, a copy of what `loaded` has just answered."""

    async def ask(candidate: Loaded) -> None:
        with replica.lease(candidate):
            began_s = asyncio.get_running_loop().time()
            theirs = await asyncio.to_thread(candidate.runtime.run, inputs)
            rows, took_s = len(next(iter(outputs.values()))), asyncio.get_running_loop().time() - began_s
            usual_s = loaded.model.latency.estimate_s(rows, loaded.model.form.size(inputs).length)
            tried.evidence.candidate.answered()
            if usual_s > 0:
                tried.evidence.candidate.took(took_s / usual_s)
            differing = rows_that_differ(loaded.codec.signature, outputs, theirs)
            tried.evidence.compared += rows
            tried.evidence.differed += differing
            replica.metrics.shadowed(candidate.name, rows, differing)

    tried.shadow(ask)


def take_feedback(replica: Replica, feedback: Sequence[Feedback]) -> int:
    """Count scores for the versions that are here; gives how many were. The truth may come back late, when
    its version is gone: that is no mistake."""
    tried, serving = replica.tried, replica.serving
    candidate = tried.candidate if tried is not None else None
    by_name = {loaded.name: loaded for loaded in (candidate, serving) if loaded is not None}
    known = [entry for entry in feedback if entry.version in by_name]
    for entry in known:
        replica.metrics.scored(entry.version, entry.score)
        if tried is not None:
            tried.side(by_name[entry.version]).scores.add(entry.score)
    return len(known)
