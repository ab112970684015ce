"""`make bench-training`: every question about training, one after the other, in one table.

Each question is a program of its own, which prints its table when it is done; one that fails is named
at the end and costs the others nothing. What all of them found is printed once more, and written as JSON
with the machine and the commit.

    python -m tests.bench.training [--pairs 5] [--only steady,recovery] [--out FILE]
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.asked import asked, finished
from tests.bench.commands import end_marked
from tests.bench.machine import REPO, distributions, machine_facts
from tests.bench.pairs import Report

QUESTIONS = (
    "loading",
    "first_step",
    "steady",
    "checkpointing",
    "recovery",
    "lending",
    "accelerator",
)
ENDS_WITHIN_S = 3600
UNWINDS_WITHIN_S = 60
MARK = "TANDEM_BENCH_QUESTION"


class Unanswered(Exception):
    """A question whose program gave no figures."""


def answer(question: str, pairs: int, folder: Path) -> Report:
    """Run one question's program and read what it found.

    Raises:
        Unanswered: it failed, and has said why, or took too long.
    """
    out = folder / f"{question}.json"
    command = [sys.executable, "-m", f"tests.bench.{question}", "--pairs", str(pairs), "--out", str(out)]
    mark = secrets.token_hex(8)
    child = subprocess.Popen(command, cwd=REPO, env={**os.environ, MARK: mark})
    try:
        code = child.wait(ENDS_WITHIN_S)
    except BaseException as error:
        child.send_signal(signal.SIGINT)  # so that it unwinds
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(UNWINDS_WITHIN_S)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unanswered(f"took more than {ENDS_WITHIN_S} s") from None
        raise
    finally:
        end_marked(MARK, mark)
    if code != 0:
        raise Unanswered(f"failed with {code}")
    return Report.read(out)


def main() -> int:
    chosen = asked(__doc__, only=(str, ",".join(QUESTIONS), "some of the questions"))
    whole = Report("Training", machine_facts(), {"both": distributions("tandem-ray", "ray", "torch")})
    failed = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        for question in chosen.only.split(","):
            try:
                found = answer(question, chosen.pairs, Path(name))
            except Unanswered as error:
                failed.append(question)
                whole.notes.append(f"{question}: not measured: it {error}")
                continue
            whole.comparisons += found.comparisons
            whole.measures += found.measures
            whole.notes += [f"{question}: {note}" for note in found.notes]
    finished(whole, chosen)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
