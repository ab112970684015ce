"""What Kubernetes would run is what is tested: `rendered_on_ray.py`, in a network of its own.

A process of its own, since the threads that this one has already would stay in the old network.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray_pod import IN_A_NETWORK_OF_ITS_OWN

TESTS = Path(__file__).parents[1]
_WITHIN_S = 200


@pytest.mark.timeout(240)
def test_rendered_manifests_on_a_real_ray() -> None:
    try:
        subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may not make a network namespace: {error}")
    pytest_inside = [sys.executable, "-m", "pytest", str(TESTS / "rendered_on_ray.py")]
    done = subprocess.run(
        [*IN_A_NETWORK_OF_ITS_OWN, *pytest_inside],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
