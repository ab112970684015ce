"""Artifacts: a set of files plus a manifest, written last, put-if-absent, that makes them exist.

    PREFIX/00000003/ab12cd34/weights.safetensors      files first, under keys unique to the attempt
    PREFIX/00000003/manifest.json                     then the commit point

Manifests are numbered (`cluster.log`): an artifact's number is its place in the log of its prefix.
A writer that dies before the manifest leaves nothing that a reader can see; two writers of one
number can't mix their files, and one of them loses. A reader checks each file's size and SHA-256
while it reads, and `newest` falls back past whatever is damaged, saying so.

Used for checkpoints and servables; knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from cluster.config import Frozen
from cluster.errors import Conflict, Damaged, NotFound, shown
from cluster.log import Log
from cluster.storage import Store

_PARALLEL_FILES = 8

T = TypeVar("T")


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


class Artifacts:
    """The artifacts of one kind below one prefix, such as a run's checkpoints."""

    def __init__(self, store: Store, prefix: str, kind: Literal["checkpoint", "servable"]) -> None:
        self._store = store
        self._prefix = prefix.rstrip("/")
        self._kind = kind
        self._log = Log(store, prefix, "/manifest.json")

    def head(self, known: int = 0) -> int:
        """The number of the newest manifest, 0 where there is none."""
        return self._log.head(known)

    def key(self, number: int) -> str:
        """The key of a manifest."""
        return self._log.key(number)

    def commit(self, number: int, files: Mapping[str, bytes | Path], meta: Mapping[str, Any]) -> Manifest:
        """Write an artifact whole: its files, side by side, then its manifest.

        Args:
            number: the number after the newest one this writer knows of.
            files: contents, or paths of local files, by name.
            meta: JSON-serialisable facts about the artifact.

        Raises:
            Conflict: another writer committed this number; its artifact stands, ours doesn't exist.
            StorageError: the store failed; nothing exists.
        """
        nonce = secrets.token_hex(8)
        folder = f"{self._prefix}/{number:08d}/{nonce}"

        def upload(name: str) -> FileEntry:
            data = files[name]
            key = f"{folder}/{name}"
            self._store.put(key, data)
            digest = hashlib.sha256()
            if isinstance(data, Path):
                with data.open("rb") as handle:
                    digest = hashlib.file_digest(handle, "sha256")
                size = data.stat().st_size
            else:
                digest.update(data)
                size = len(data)
            return FileEntry(key=key, size_bytes=size, sha256=digest.hexdigest())

        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            entries = dict(zip(files, pool.map(upload, files), strict=True))
        manifest = Manifest(kind=self._kind, number=number, nonce=nonce, files=entries, meta=dict(meta))
        manifest = manifest.sealed()
        if not self._log.try_append(number, manifest.model_dump_json(indent=1).encode()):
            raise Conflict(
                f"another writer committed {self._kind} {number} of '{self._prefix}' first",
                got=f"our attempt {nonce}",
                fix="make sure that only one driver writes this run, then resume it",
            )
        return manifest

    def read(self, number: int) -> Manifest:
        """The manifest of artifact `number`.

        Raises:
            NotFound: there is none.
            Damaged: it isn't what was written.
        """
        data = self._log.read(number)
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise self._damaged(number, str(error.errors()[0]["msg"])) from None
        if not manifest.whole:
            raise self._damaged(number, "its digest is not that of its contents")
        if (manifest.kind, manifest.number) != (self._kind, number):
            raise self._damaged(number, f"it is {manifest.kind} {manifest.number}")
        return manifest

    def _damaged(self, number: int, got: str) -> Damaged:
        return Damaged(
            f"the manifest of {self._kind} {number} of '{self._prefix}' is not what was written",
            got=shown(got),
            allowed="the manifest as it was committed",
            fix="restore it; an older one is used where there is one",
        )

    def newest(
        self, load: Callable[[Manifest], T], on_damage: Callable[[int, Exception], None], head: int = 0
    ) -> tuple[Manifest, T] | None:
        """Load the newest artifact that is whole, falling back past damaged ones.

        Args:
            load: reads the artifact's files (through `read_file`) and builds what the caller wants.
            on_damage: told of each artifact passed over, with why.
            head: the newest number, where the caller knows it.

        Returns:
            The manifest and what `load` gave, or None where no artifact is whole.
        """
        for number in range(head or self.head(), 0, -1):
            try:
                manifest = self.read(number)
                return manifest, load(manifest)
            except (Damaged, NotFound) as error:
                on_damage(number, error)
        return None

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """One file's bytes, verified. See `read_file`."""
        return read_file(self._store, manifest, name)


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
    data = store.get(entry.key)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != entry.size_bytes or digest != entry.sha256:
        raise Damaged(
            f"'{entry.key}' is not what was written",
            got=f"{len(data)} bytes, SHA-256 {digest}",
            allowed=f"{entry.size_bytes} bytes, SHA-256 {entry.sha256}",
            fix="restore the object from a backup, or use an older artifact",
        )
    return data
