"""What a client says of time and urgency, by headers and by the protocol's parameters."""

import pytest

from cluster.errors import BadRequest
from serving.protocol.terms import DEFAULT, HIGHEST, LOWEST, Terms, read_terms

TIMEOUT, PRIORITY = b"x-request-timeout-seconds", b"x-request-priority"


@pytest.mark.parametrize(
    ("asked", "expected_s"),
    [
        (None, 3.0),
        (b"1", 2.0),
        (b"60", 3.0),
        (b"-1", 3.0),
        (b"nan", 3.0),
        (b"inf", 3.0),
        (b"x", 3.0),
        (b"0.5", 1.5),
        (b"1" * 99, 3.0),
    ],
)
def test_a_client_may_ask_for_less_time_only(asked: bytes | None, expected_s: float) -> None:
    headers = {} if asked is None else {TIMEOUT: asked}
    assert read_terms(headers, {}).deadline_s(1.0, 2.0) == expected_s


def test_the_protocols_parameters_are_those_of_triton() -> None:
    assert read_terms({}, {"timeout": 250_000, "priority": 1}) == Terms(0.25, HIGHEST)
    assert read_terms({}, {"timeout": 0, "priority": 0}) == Terms(None, DEFAULT)
    assert read_terms({}, {"sequence_id": 5}) == Terms()


def test_the_shorter_time_and_the_higher_priority_count() -> None:
    headers = {TIMEOUT: b"0.1", PRIORITY: b"3"}
    assert read_terms(headers, {}) == Terms(0.1, LOWEST)
    assert read_terms(headers, {"timeout": 50_000, "priority": 1}) == Terms(0.05, HIGHEST)


@pytest.mark.parametrize(
    ("headers", "parameters"),
    [
        ({PRIORITY: b"4"}, {}),
        ({PRIORITY: b"high"}, {}),
        ({PRIORITY: b""}, {}),
        ({}, {"priority": 4}),
        ({}, {"priority": True}),
        ({}, {"priority": 1.5}),
        ({}, {"timeout": -1}),
        ({}, {"timeout": "5"}),
        ({}, {"timeout": 2**64}),
    ],
)
def test_what_cannot_be_read_is_refused(headers: dict, parameters: dict) -> None:
    with pytest.raises(BadRequest):
        read_terms(headers, parameters)
