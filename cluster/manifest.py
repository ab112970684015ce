"""What an artifact consists of: files by name, each with its size and SHA-256, and the seal over all of it.

A manifest is read by whoever reads the artifact, and believed only as far as its digest holds; so is
each file. How one comes to be, and which is the newest, is said in `cluster.artifacts`.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field

from cluster.attempts import Writer
from cluster.config import Frozen
from cluster.errors import Damaged, NotFound
from cluster.storage import Store

__all__ = ["FileEntry", "Manifest", "Writer", "read_file"]

_READS = 2
"""A file that is not what was written is read once more: it may have been spoiled on the way only."""


class FileEntry(Frozen):
    """One file of an artifact."""

    key: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Frozen):
    """What an artifact consists of. `meta` is whatever its owner records beside the files."""

    format: Literal[1] = 1
    kind: Literal["checkpoint", "servable"]
    number: int = Field(ge=1)
    nonce: str
    files: dict[str, FileEntry]
    meta: dict[str, Any] = {}
    # Not written where they say nothing, so that digests made before there were such fields still hold.
    writer: Writer | None = Field(None, exclude_if=lambda writer: writer is None)
    is_fence: bool = Field(False, exclude_if=lambda is_fence: not is_fence)
    """No artifact, only the sign that a newer writer has taken over."""
    digest: str = ""
    """SHA-256 of all of the above, so that a changed bit in the manifest itself is seen too."""

    def sealed(self) -> Manifest:
        """This with its digest, as it comes back from JSON."""
        plain = Manifest.model_validate_json(self.model_dump_json())
        return plain.model_copy(update={"digest": plain._digest()})

    @property
    def whole(self) -> bool:
        """Whether the digest is that of the rest."""
        return self.digest == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()


def read_file(store: Store, manifest: Manifest, name: str) -> bytes:
    """One file's bytes, their size and SHA-256 checked against the manifest.

    Raises:
        NotFound: the manifest lists no such file, or the object is gone.
        Damaged: the bytes aren't what was written.
        StorageError: the store can't be read.
    """
    if name not in manifest.files:
        raise NotFound(
            f"{manifest.kind} {manifest.number} has no file '{name}'",
            allowed=", ".join(sorted(manifest.files)),
        )
    entry = manifest.files[name]
    for attempt in range(_READS):
        data = store.get(entry.key)
        digest = hashlib.sha256(data).hexdigest()
        if len(data) == entry.size_bytes and digest == entry.sha256:
            break
        if attempt == _READS - 1:
            raise Damaged(
                f"'{entry.key}' is not what was written",
                got=f"{len(data)} bytes, SHA-256 {digest}",
                allowed=f"{entry.size_bytes} bytes, SHA-256 {entry.sha256}",
                fix="restore the object from a backup, or use an older artifact",
            )
    return data
