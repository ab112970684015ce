"""Fixtures of the integration tests: real parts, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from seaweed import Seaweed


@pytest.fixture(scope="session")
def s3() -> Iterator[Seaweed]:
    """A real S3 server. Its `env` is for the client to set; `s3_env` sets it for one test."""
    with Seaweed() as server:
        yield server


@pytest.fixture
def s3_env(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The server, with this process's environment pointing at it for the length of a test."""
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3
