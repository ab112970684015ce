"""What Tandem has started on this machine: one record a local Ray, and its processes.

A record is a JSON file of mode 0600 below the state directory ($TANDEM_STATE_DIR, else
$XDG_STATE_HOME/tandem, else ~/.local/state/tandem). Every process of a local Ray carries the
record's id in its environment, and that mark is all that says which processes are ours: a process
id may be recycled and a name may be anybody's, but nobody else's environment holds 96 random bits.

Doesn't know how Ray is started (`cluster.holder`) or used (`cluster.local`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import ValidationError

from cluster.config import Frozen

ID_VARIABLE = "TANDEM_LOCAL_ID"
_REAP_DEADLINE_S = 10.0
_REAP_POLL_S = 0.05


class LocalRecord(Frozen):
    """One local Ray: what was asked for, and, once it runs, where it is reached."""

    id: str
    purpose: str
    """What it was started for, for people's eyes."""
    created_at: datetime
    token: str
    temp_dir: str
    """Holds Ray's session; ours alone, removed with the record."""
    num_cpus: int | None = None
    num_gpus: int | None = None
    dashboard: bool = False
    holder_pid: int | None = None
    address: str | None = None
    """`HOST:PORT`; None until Ray is up."""
    dashboard_url: str | None = None
    notes: dict[str, str] = {}
    """What whoever started it wants `tandem status` to show, such as a service's URL."""

    @property
    def path(self) -> Path:
        """The record's own file."""
        return state_dir() / f"ray-{self.id}.json"

    def save(self) -> None:
        """Write the record, whole or not at all, readable by its owner alone."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".ray-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self.model_dump_json(indent=1))
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def forget(self) -> None:
        """Remove the temporary files, then the record: a record outlives what it stands for."""
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self.path.unlink(missing_ok=True)


def state_dir() -> Path:
    """Where records are kept. Not made here."""
    if own := os.environ.get("TANDEM_STATE_DIR"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_STATE_HOME"):
        return Path(xdg) / "tandem"
    return Path.home() / ".local" / "state" / "tandem"


def load_record(path: Path) -> LocalRecord | None:
    """The record in a file; None where it is gone or isn't one."""
    try:
        return LocalRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def records() -> list[LocalRecord]:
    """Every record, oldest first; of running and of half-dead local Rays alike."""
    found = [load_record(path) for path in state_dir().glob("ray-*.json")]
    return sorted((record for record in found if record), key=lambda record: record.created_at)


def processes(local_id: str) -> list[psutil.Process]:
    """The living processes that carry this id, in no order."""
    return [process for process in psutil.process_iter() if _carries(process, local_id)]


def is_ours(pid: int | None, local_id: str) -> bool:
    """Whether process `pid` lives and carries this id."""
    try:
        return pid is not None and _carries(psutil.Process(pid), local_id)
    except psutil.NoSuchProcess:
        return False


def reap(local_id: str, spare: Collection[int] = (), deadline_s: float = _REAP_DEADLINE_S) -> int:
    """Kill every process that carries this id, but those in `spare`, until none is left.

    Returns:
        How many processes were killed.
    """
    killed: set[int] = set()
    give_up_s = time.monotonic() + deadline_s
    while time.monotonic() < give_up_s:
        # Again and again, since a process may be starting another while it is being killed.
        victims = [process for process in processes(local_id) if process.pid not in spare]
        if not victims:
            break
        for process in victims:
            try:
                process.kill()
                killed.add(process.pid)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(victims, timeout=_REAP_POLL_S)
    return len(killed)


def _carries(process: psutil.Process, local_id: str) -> bool:
    try:
        return process.environ().get(ID_VARIABLE) == local_id and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:  # gone, a zombie, or another user's: not ours to look at
        return False
