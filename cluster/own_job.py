"""The Ray job whose driver this process is: what it is called, and how it says that trying again can't help.

KubeRay (1.7) tries a RayJob again whenever its Ray job FAILED, whatever the exit code, and has no rule
about codes. A job that was STOPPED is over for it. So a driver that ends for a reason which every attempt
would meet again, such as bad input or a gate that refuses, stops its own job: no cluster is built to hear
the same, and nobody takes the job for one that succeeded.

Knows Ray's jobs API; knows nothing of Kubernetes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import typer

from cluster import output
from cluster.errors import BadInput, GateRefused, TandemError, shown

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a job; the name is Ray's own."""
_FINAL = (BadInput.exit_code, GateRefused.exit_code)
_STOP_DEADLINE_S = 60.0


def own_job_id(env: Mapping[str, str]) -> str:
    """The submission id of the job that this process drives.

    Raises:
        BadInput: it drives none.
    """
    try:
        return str(json.loads(env[_JOB_CONFIG])["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            "this isn't the driver of a Ray job",
            got="no job's id in the environment",
            allowed="--as-job in what the Ray Jobs API runs",
            fix="leave --as-job out, or send the command as a job",
        ) from None


def run_of_job(job_id: str) -> str:
    """The name that all attempts at a job share: its id without what follows the last `-`.

    KubeRay numbers the attempts of a RayJob so, and `tandem submit` does.

    Raises:
        BadInput: there is no such part.
    """
    run, _, attempt = job_id.rpartition("-")
    if not run or not attempt:
        raise BadInput(
            "the job's id names no run", got=shown(job_id), allowed="RUN-ATTEMPT", fix="give --run"
        )
    return run


@contextmanager
def final_stops_job(job_id: str | None, stop: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within it, what would end with an exit code that no attempt can better stops the job instead.

    The error is shown first, since this process is told to stop as well. Where stopping fails, or nobody ends
    this process, it ends as it would have.

    Args:
        job_id: of the own job; None changes nothing.
        stop: asks Ray to stop a job, and returns once that is under way.
    """
    try:
        yield
    except (TandemError, typer.Exit) as error:
        if job_id is not None and error.exit_code in _FINAL:
            if isinstance(error, TandemError):
                output.show_error(error)
            output.say(f"job {job_id} stops itself: every attempt would end so (exit {error.exit_code})")
            (stop or _stop)(job_id)
        raise


def _stop(job_id: str) -> None:
    from ray.job_submission import JobSubmissionClient

    try:
        # Finds the cluster, and its token, in the environment that Ray has made for a driver.
        JobSubmissionClient().stop_job(job_id)
    except (RuntimeError, OSError) as error:
        output.say(f"job {job_id} can't be stopped, and will be tried again: {shown(str(error))}")
        return
    time.sleep(_STOP_DEADLINE_S)  # SIGTERM ends this; a code of our own now would make the job FAILED


def environment() -> Mapping[str, str]:
    """Where Ray tells a driver which job it is."""
    return os.environ
