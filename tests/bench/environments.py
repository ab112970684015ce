"""Virtual environments for peers, outside the repository, because their pins clash with Ray's.

They stand in $TANDEM_BENCH_ENVIRONMENTS, or ~/.cache/tandem-bench, one folder a peer, and are made
again when a pin changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_WITHIN_S = 600
_STAMP = "installed.txt"


class NotInstalled(Exception):
    """A peer that can't be installed here; the text says why."""


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The `bin` folder of an environment with exactly these packages and what they need.

    Raises:
        NotInstalled: pip failed.
    """
    base = Path(os.environ.get("TANDEM_BENCH_ENVIRONMENTS", "~/.cache/tandem-bench")).expanduser()
    folder = base / name
    stamp, wanted = folder / _STAMP, "\n".join(requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements])
    stamp.write_text(wanted)
    return folder / "bin"


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_WITHIN_S)
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        raise NotInstalled(said[-1] if said else f"{command[0]} ended with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"not done in {INSTALL_WITHIN_S} s") from None
