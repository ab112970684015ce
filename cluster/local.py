"""A private Ray on this machine, that goes away with whoever started it.

    with LocalRay.start(purpose="train") as local, connect(None, local=local):
        ...

It runs under a holder process (`cluster.holder`), listens on loopback only, and asks for a token of
its own. A *tied* one ends with the process that started it, even by SIGKILL; an untied one ends
with `stop()` or `tandem down`. `running()` lists what there is, `stop_all()` is `tandem down`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from cluster import machine
from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import TandemError, shown
from cluster.machine import LocalRecord

START_DEADLINE_S = 90.0
STOP_DEADLINE_S = 20.0
_LOOK_EVERY_S = 0.05
_MAX_TEMP_BASE_CHARS = 20
_LOG_TAIL_BYTES = 2000

# What would send a new Ray's processes to another Ray, or give them its token.
_OTHER_RAYS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR")
# With clusters "disabled", as Ray does on a Mac, all of its processes bind to loopback only, and
# drivers don't take 127.0.0.1 for the machine's outer address.
NO_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOOPBACK_ONLY = {NO_CLUSTERS: "0"}
_HOLDER_SETTINGS = {
    **LOOPBACK_ONLY,
    "DASHBOARD_METRIC_PORT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_told_of_losses: list[Callable[[str], None]] = []


@contextmanager
def lost_rays_told_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Have `tell` called, from a thread, with the purpose of a tied Ray that this process started and that
    is gone without this process having stopped it. Ray itself takes a minute to notice."""
    _told_of_losses.append(tell)
    try:
        yield
    finally:
        _told_of_losses.remove(tell)


class LocalRay:
    """A handle on one local Ray. Made by `start` or `running`."""

    def __init__(self, record: LocalRecord, holder: subprocess.Popen[bytes] | None = None) -> None:
        self.record = record
        self._holder = holder
        self._stopping = threading.Event()

    @classmethod
    def start(
        cls,
        *,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        env: Mapping[str, str] | None = None,
        dashboard: bool = False,
        tied: bool = True,
        purpose: str = "a command",
        deadline_s: float = START_DEADLINE_S,
        clock: Clock = SYSTEM_CLOCK,
    ) -> LocalRay:
        """Start a Ray and wait until it can be connected to.

        Args:
            num_cpus: how many it offers; None for as many as there are. Likewise `num_gpus`.
            env: environment variables for all of its processes, beside this process's own. `{temp_dir}`
                in a value stands for a folder of its own, which is removed with it.
            dashboard: whether the dashboard, and with it the jobs API, is served.
            tied: whether it ends when this process does.
            purpose: what `tandem status` says it is for.
            deadline_s: how long the start may take.

        Raises:
            TandemError: Ray didn't start within the deadline.
        """
        record = LocalRecord(
            id=secrets.token_hex(12),
            purpose=purpose,
            created_at=clock.wall(),
            token=secrets.token_urlsafe(32),
            temp_dir=tempfile.mkdtemp(prefix="tandem-", dir=_short_temp_base()),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            dashboard=dashboard,
        )
        with tempfile.TemporaryFile() as log:
            try:
                record.save()
                holder = _spawn_holder(record, env or {}, tied, log)
                local = cls(record, holder)
                local._await_start(log, deadline_s)
                if tied:
                    local._watch(holder)
            except BaseException:
                cls(record).stop()
                raise
        return local

    @property
    def address(self) -> str:
        """`HOST:PORT`, as `ray.init` takes it."""
        assert self.record.address is not None, "start() and running() give only Rays that are up"
        return self.record.address

    @property
    def dashboard_url(self) -> str | None:
        """Where the dashboard and the jobs API are, if they were asked for."""
        return self.record.dashboard_url

    @property
    def env(self) -> dict[str, str]:
        """What a driver must have in its environment to connect."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.record.token, **LOOPBACK_ONLY}

    @property
    def alive(self) -> bool:
        """Whether its holder is there; where it isn't, only leftovers are."""
        return machine.is_ours(self.record.holder_pid, self.record.id)

    def note(self, **notes: str) -> None:
        """Add to what `tandem status` shows of it, such as `url=...`."""
        self.record = self.record.model_copy(update={"notes": {**self.record.notes, **notes}})
        self.record.save()

    def stop(self, deadline_s: float = STOP_DEADLINE_S) -> None:
        """Shut it down and remove whatever it left; does nothing where it is gone already."""
        self._stopping.set()
        holder_pid = self._holder.pid if self._holder else self.record.holder_pid
        if holder_pid is not None and machine.is_ours(holder_pid, self.record.id):
            _terminate(holder_pid, deadline_s)
        machine.reap(self.record.id)
        if self._holder is not None:
            self._holder.wait(deadline_s)
        self.record.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self, holder: subprocess.Popen[bytes]) -> None:
        def wait() -> None:
            holder.wait()
            if not self._stopping.is_set():
                for tell in list(_told_of_losses):
                    tell(self.record.purpose)

        threading.Thread(target=wait, name="local Ray", daemon=True).start()

    def _await_start(self, log: IO[bytes], deadline_s: float) -> None:
        assert self._holder is not None
        give_up_s = time.monotonic() + deadline_s
        while time.monotonic() < give_up_s:
            record = machine.load_record(self.record.path)
            if record is not None and record.address is not None:
                self.record = record
                return
            if self._holder.poll() is not None:
                break
            time.sleep(_LOOK_EVERY_S)
        died = self._holder.poll() is not None
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        tail = log.read().decode(errors="replace").strip()
        raise TandemError(
            "Ray could not be started on this machine",
            got=shown(tail.splitlines()[-1]) if tail else "no word from it",
            allowed="its processes to come up" if died else f"an answer within {deadline_s:.0f} s",
            fix="look for room in memory and in " + tempfile.gettempdir() + ", then try again",
        )


def running() -> list[LocalRay]:
    """Every local Ray that is up, or that has left something behind, oldest first."""
    return [LocalRay(record) for record in machine.records()]


def find(address: str) -> LocalRay | None:
    """The local Ray that listens at `address` (`HOST:PORT`, or its dashboard's URL), if one does."""
    wanted = address.rstrip("/")
    return next(
        (ray for ray in running() if wanted in (ray.record.address, ray.record.dashboard_url)),
        None,
    )


def stop_all() -> list[LocalRay]:
    """Stop every local Ray that Tandem started as this user, and nothing else.

    Returns:
        Those that were stopped.
    """
    found = running()
    for local in found:
        local.stop()
    return found


def _spawn_holder(
    record: LocalRecord, env: Mapping[str, str], tied: bool, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if name not in _OTHER_RAYS}
    # A job's entrypoint looks for `python` and `tandem` in PATH; they are those that run now.
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    asked = {name: value.replace("{temp_dir}", record.temp_dir) for name, value in env.items()}
    # What its processes leave in the temporary folder when they are killed goes with its own folder.
    temporary = Path(record.temp_dir) / "t"
    temporary.mkdir()
    asked["TMPDIR"] = str(temporary)
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": record.token, machine.ID_VARIABLE: record.id}
    parent_pid = os.getpid() if tied else 0
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.holder", str(record.path), str(parent_pid)],
        env={**inherited, "PATH": path, **_HOLDER_SETTINGS, **asked, **ours},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _terminate(pid: int, deadline_s: float) -> None:
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        process.wait(deadline_s)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        return  # what is left is reaped


def _short_temp_base() -> str:
    """Ray's socket paths must fit into 107 characters, so a long TMPDIR won't do."""
    base = tempfile.gettempdir()
    return base if len(base) <= _MAX_TEMP_BASE_CHARS else "/tmp"
