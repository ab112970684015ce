"""Where a node keeps what can be fetched again: `TANDEM_CACHE_DIR`, or else `~/.cache/tandem`.

On Kubernetes that is an `emptyDir`, since the root file system is read-only there.
"""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = "TANDEM_CACHE_DIR"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def node_folder(name: str) -> Path:
    """The folder of one kind of things, made if it isn't there, for this user only.

    Raises:
        OSError: it can't be made, or others may write to it.
        RuntimeError: there is no home folder, and the variable isn't set.
    """
    configured = os.environ.get(ENVIRONMENT)
    folder = (Path(configured) if configured else Path.home() / ".cache" / "tandem") / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} may be written to by others")
    return folder


def boot_id() -> str:
    """Of the machine's last start: what was written before that may not have reached the disk."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
