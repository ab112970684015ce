"""A driver that no other attempt can better stops its own job; every other end is left as it is."""

from __future__ import annotations

import json

import pytest
import typer

from cluster.errors import BadInput, Conflict, GateRefused, TandemError
from cluster.own_job import final_stops_job, own_job_id, run_of_job

ENV = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "nightly-x7k2p-9qwe1"}})}


def test_the_run_is_the_same_in_every_attempt() -> None:
    job_id = own_job_id(ENV)
    assert job_id == "nightly-x7k2p-9qwe1"
    assert run_of_job(job_id) == run_of_job("nightly-x7k2p-00000") == "nightly-x7k2p"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"metadata": null}'])
def test_no_job_is_bad_input(text: str | None) -> None:
    with pytest.raises(BadInput, match="isn't the driver"):
        own_job_id({} if text is None else {"RAY_JOB_CONFIG_JSON_ENV_VAR": text})


@pytest.mark.parametrize("job_id", ["alone", "-x", "x-", ""])
def test_an_id_that_names_no_run(job_id: str) -> None:
    with pytest.raises(BadInput, match="names no run"):
        run_of_job(job_id)


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (BadInput("no", got="x"), True),
        (GateRefused("no", got="x"), True),
        (typer.Exit(3), True),
        (typer.Exit(1), False),
        (Conflict("no", got="x"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_what_cannot_be_bettered_stops_the_job(error: BaseException, stops: bool) -> None:
    stopped: list[str] = []
    with pytest.raises(type(error)), final_stops_job("run-1", stopped.append):
        raise error
    assert stopped == (["run-1"] if stops else [])


def test_outside_a_job_nothing_changes() -> None:
    stopped: list[str] = []
    with pytest.raises(TandemError), final_stops_job(None, stopped.append):
        raise BadInput("no", got="x")
    with final_stops_job("run-1", stopped.append):
        pass
    assert stopped == []
