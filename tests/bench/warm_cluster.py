"""A Ray that is up before the clock starts, for both sides alike, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.local import LocalRay
from tests.bench.machine import REPO


@dataclass(frozen=True)
class WarmCluster:
    """A running Ray."""

    address: str
    variables: dict[str, str]
    """What a command needs in its environment to connect, be it Tandem's or a peer's."""


@contextlib.contextmanager
def warm_cluster(
    folder: Path, *, num_cpus: int, variables: Mapping[str, str] | None = None
) -> Iterator[WarmCluster]:
    """A local Ray with records of its own in `folder`, so that it meets no other of this user's.

    Args:
        variables: more of its workers' environment.
    """
    state = {"TANDEM_STATE_DIR": str(folder / "state")}
    before = os.environ.get("TANDEM_STATE_DIR")
    os.environ.update(state)
    try:
        # Peers' modules are in the repository, which isn't installed as a package.
        env = {"PYTHONPATH": str(REPO), **(variables or {})}
        with LocalRay.start(num_cpus=num_cpus, env=env, purpose="a benchmark") as local:
            yield WarmCluster(local.address, {**local.env, **state})
    finally:
        if before is None:
            del os.environ["TANDEM_STATE_DIR"]
        else:
            os.environ["TANDEM_STATE_DIR"] = before
