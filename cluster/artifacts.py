"""Artifacts: a set of files plus a manifest, written last, put-if-absent, that makes them exist.

    PREFIX/00000003/ab12cd34/weights.safetensors      files first, under keys unique to the attempt
    PREFIX/00000003/manifest.json                     then the commit point

Manifests are numbered (`cluster.log`): an artifact's number is its place in the log of its prefix.
A writer that dies before the manifest leaves nothing that a reader can see; two writers of one
number can't mix their files, and one of them loses. A reader checks each file's size and SHA-256
while it reads, and `newest` falls back past whatever is damaged, saying so.

Writers that follow one another are ordered (`Writer`). A writer takes one number after another and
never jumps, so it meets whatever a newer one wrote, and stops there for ever. One that takes over
writes a `fence` first, an entry without files: from then on its predecessor, even one that wakes up
hours later in the middle of a commit, can write nothing behind it.

Used for checkpoints and servables; knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from cluster.attempts import FIRST_WRITER, Writer
from cluster.errors import Conflict, Damaged, NotFound, shown
from cluster.log import Log
from cluster.manifest import FileEntry, Manifest, read_file
from cluster.storage import Store

_PARALLEL_FILES = 8

T = TypeVar("T")


class Artifacts:
    """The artifacts of one kind below one prefix, such as a run's checkpoints."""

    def __init__(self, store: Store, prefix: str, kind: Literal["checkpoint", "servable"]) -> None:
        self._store = store
        self._prefix = prefix.rstrip("/")
        self._kind = kind
        self._log = Log(store, prefix, "/manifest.json")

    def head(self, known: int = 0) -> int:
        """The number of the newest manifest, 0 where there is none.

        Args:
            known: one that exists. Without it the folders are listed too: where somebody has deleted a
                checkpoint by hand, probing alone stops at the hole, and what stands behind it would be lost
                to readers, and stay open to writers that a fence should shut out.
        """
        head = self._log.head(known)
        if known:
            return head
        numbers = (int(name) for name in self._store.folders(self._prefix) if name.isdecimal())
        for number in sorted((n for n in numbers if n > head), reverse=True):
            if self._log.has(number):
                return self._log.head(number)
        return head

    def key(self, number: int) -> str:
        """The key of a manifest."""
        return self._log.key(number)

    def folder(self, number: int, nonce: str) -> str:
        """Where the files of an attempt at artifact `number` belong; `nonce` is the attempt's own."""
        return f"{self._prefix}/{number:08d}/{nonce}"

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
        folder = self.folder(number, nonce)

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

    def publish(
        self,
        number: int,
        nonce: str,
        entries: Mapping[str, FileEntry],
        meta: Mapping[str, Any],
        writer: Writer,
    ) -> Manifest:
        """Make an artifact of files that are in the store already, unless a newer writer has taken over.

        It may be called again with the same arguments after a `StorageError`, which leaves it open
        whether the artifact exists: there is never a second one.

        Args:
            number: the number after the newest one this writer knows of. The artifact gets the next
                one where an older writer, or an earlier attempt of this one, has taken it.
            nonce: the attempt's own; see `folder`.

        Returns:
            The manifest, with the number that it got.

        Raises:
            Conflict: a newer writer has taken over; this one must stop for good.
            StorageError: the store failed.
        """
        manifest = Manifest(
            kind=self._kind,
            number=number,
            nonce=nonce,
            files=dict(entries),
            meta=dict(meta),
            writer=writer,
        )
        return self._append(manifest, writer)

    def fence(self, writer: Writer) -> Manifest:
        """Shut out every older writer: what it has not committed by now, it never will.

        Raises:
            Conflict: a newer writer than `writer` has been here.
            StorageError: the store failed.
        """
        head = self.head()
        newest = next((m for number in range(head, 0, -1) if (m := self._standing(number))), None)
        if newest is not None:
            self._check_not_newer(newest, writer)
        manifest = Manifest(
            kind=self._kind,
            number=head + 1,
            nonce=secrets.token_hex(8),
            files={},
            writer=writer,
            is_fence=True,
        )
        return self._append(manifest, writer)

    def _append(self, manifest: Manifest, writer: Writer) -> Manifest:
        """Write a manifest with its number, or the next one that no older writer has taken."""
        while True:
            manifest = manifest.sealed()
            if self._log.try_append(manifest.number, manifest.model_dump_json(indent=1).encode()):
                return manifest
            winner = self._standing(manifest.number)
            if winner is not None:
                if (winner.nonce, winner.writer) == (manifest.nonce, writer):
                    return winner
                self._check_not_newer(winner, writer)
            manifest = manifest.model_copy(update={"number": manifest.number + 1})

    def _standing(self, number: int) -> Manifest | None:
        """What stands at a number that is taken; None where that can't be told.

        A damaged entry doesn't stop a writer, nor one that is gone: if a newer one wrote it, the next tells.
        """
        try:
            return self.read(number)
        except (Damaged, NotFound):
            return None

    def _check_not_newer(self, winner: Manifest, writer: Writer) -> None:
        newer = winner.writer or FIRST_WRITER
        if newer > writer:
            raise Conflict(
                f"a newer writer has taken over '{self._prefix}'",
                got=f"{writer}, and entry {winner.number} by {newer}",
                allowed="the newest writer only",
                fix="nothing is lost: let this process end, the newer one goes on",
            )

    def last(self, head: int = 0) -> Manifest | None:
        """The newest manifest of an artifact, its files unread; None where there is none.

        Args:
            head: the newest number, where the caller knows it.

        Raises:
            Damaged: it isn't what was written.
        """
        for number in range(head or self.head(), 0, -1):
            try:
                manifest = self.read(number)
            except NotFound:  # a hole, made by hand
                continue
            if not manifest.is_fence:
                return manifest
        return None

    def read(self, number: int) -> Manifest:
        """The manifest of artifact `number`, which may be a fence.

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
        """Load the newest artifact that is whole, falling back past damaged ones, and past fences silently.

        Args:
            load: reads the artifact's files (through `read_file`) and builds what the caller wants.
            on_damage: told of each artifact passed over, with why.
            head: the newest number, where the caller knows it.

        Returns:
            The manifest and what `load` gave, or None where no artifact is whole. There has been
            none at all (only fences, or nothing) if `on_damage` was not called either.
        """
        for number in range(head or self.head(), 0, -1):
            try:
                manifest = self.read(number)
                if manifest.is_fence:
                    continue
                return manifest, load(manifest)
            except (Damaged, NotFound) as error:
                on_damage(number, error)
        return None

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """One file's bytes, verified. See `cluster.manifest.read_file`."""
        return read_file(self._store, manifest, name)
