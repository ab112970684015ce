"""KubeRay's CRDs, for tests: data that lies beside the repository, not in it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from k8s.validate import Crds

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY.parent / "shared" / "kuberay-crds"
EXAMPLES = REPOSITORY / "k8s" / "examples"


@functools.cache
def _loaded() -> Crds:
    return Crds.load(FOLDER)


def crds() -> Crds:
    """The CRDs; skips the test, saying so, where they aren't to be had."""
    if not FOLDER.is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {FOLDER}: nothing to validate against")
    return _loaded()
