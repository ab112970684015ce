"""`tandem`: the front door. Composes the commands and turns errors into words and exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 3 the gate refused, 130 interrupted, 143 told to stop.
Importing this loads neither Ray nor torch (a test holds it), so `tandem --help` is quick.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from cluster import output
from cluster.commands import (
    data,
    keys,
    kubernetes,
    machine,
    models,
    pins,
    quickstart,
    runs,
    serving,
    simulate,
    training,
    trials,
)
from cluster.errors import TandemError

_INTERRUPTED = 130
_TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    name="tandem",
    help="Train models on a Ray cluster and serve them from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(training.train)
app.command()(training.submit)
app.add_typer(runs.runs_app, name="runs")
runs.runs_app.command()(pins.pin)
runs.runs_app.command()(pins.unpin)
app.command()(training.logs)
app.add_typer(models.models_app, name="models")
models.models_app.command()(trials.canary)
models.models_app.command()(trials.shadow)
models.models_app.command()(trials.abandon)
app.command()(serving.serve)
app.command()(simulate.simulate)
app.add_typer(keys.keys_app, name="keys")
app.add_typer(data.data_app, name="data")
app.add_typer(kubernetes.k8s_app, name="k8s")
app.command()(quickstart.quickstart)
app.command()(machine.up)
app.command()(machine.down)
app.command()(machine.status)
app.command()(machine.version)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code. `argv` is without the program's name."""
    with _sigterm_interrupts() as told_to_stop:
        code = _run(argv)
        return _TERMINATED if told_to_stop.is_set() and code == _INTERRUPTED else code


def _run(argv: Sequence[str] | None) -> int:
    try:
        app(args=None if argv is None else list(argv), prog_name="tandem")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except TandemError as error:
        output.show_error(error)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the process's edge: nothing above would say it better
        output.show_bug(error)
        return 1
    return 0


@contextmanager
def _sigterm_interrupts() -> Iterator[threading.Event]:
    """SIGTERM unwinds as Ctrl-C does, so that what a command has started is cleaned up on the way out.

    By KeyboardInterrupt, since Ray's waiting calls turn a SystemExit into exit code 1.
    """
    told_to_stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told_to_stop
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        told_to_stop.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield told_to_stop
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
