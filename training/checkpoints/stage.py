"""What one training process keeps for its checkpoints: an arena, and the uploader beside it.

Made once per process; generations of the group, and their `Saver`s, come and go around it. The arena is
filled by the training thread, which waits for nothing but the copy; an uploader that dies costs the
checkpoint it was at and is started again for the next.

Knows neither ranks nor manifests.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from training.checkpoints.arena import Arena, ArenaFile
from training.checkpoints.orders import Source, Upload
from training.checkpoints.pieces import Part
from training.checkpoints.uploader_process import (
    LOWEST_PRIORITY,
    Entries,
    OnTrouble,
    UploaderProcess,
    failed,
    overtaken,
)


class Snapshot:
    """A share as it lies in the arena, until the next one takes its place."""

    def __init__(self, files: tuple[ArenaFile, ...]) -> None:
        self.files = files
        self.is_current = True
        self.upload: Future[Entries] | None = None


class Stage:
    """The arena and the uploader of one process.

    `take` is called by one thread at a time, `upload` by another.
    """

    def __init__(self) -> None:
        self._arena = Arena()
        self._lock = threading.Lock()
        self._uploader: UploaderProcess | None = None
        self._current: Snapshot | None = None
        self._jobs = 0
        self._is_closed = False

    def prepare(self, size_bytes: int) -> None:
        """Start the uploader and make `size_bytes` of memory exist, aside and with the lowest priority."""

        def work() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            with contextlib.suppress(OSError, ValueError):  # no memory: the first snapshot will say so
                self._arena.reserve(size_bytes)
                self._arena.populate()

        with self._lock:
            self._ready()
        if size_bytes > self._arena.size_bytes:
            threading.Thread(target=work, name="arena", daemon=True).start()

    def take(self, parts: Sequence[Part], rank: int, patience_s: float) -> Snapshot:
        """Copy a share into the arena.

        Args:
            patience_s: how long an upload of the snapshot before may still take; then it is abandoned.
        """
        with self._lock:
            before = self._current
        if before is not None and before.upload is not None:
            with contextlib.suppress(Exception):
                before.upload.exception(patience_s)
        with self._lock:
            if before is not None:
                before.is_current = False
                if before.upload is not None:
                    failed(before.upload, overtaken())
            self._current = None
        snapshot = Snapshot(self._arena.hold(parts, rank))
        with self._lock:
            self._current = snapshot
        return snapshot

    def upload(
        self,
        snapshot: Snapshot,
        *,
        store: str,
        folder: str,
        retry_s: float,
        calm_s: float,
        mb_per_s: float | None,
        on_trouble: OnTrouble,
    ) -> Future[Entries]:
        """Put a snapshot's files into a store, under `folder/NAME`.

        Args:
            store: its URI.
            retry_s: for how long a store that fails is tried again.
            calm_s: how long it may take for the steps' sake.
            mb_per_s: a limit; without one, what `tell` says of the steps decides.
            on_trouble: told, by a thread, of failures after which it is tried again.

        Returns:
            The files' entries, or a `StorageError`, once it is known.
        """
        done: Future[Entries] = Future()
        with self._lock:
            if self._is_closed or not snapshot.is_current:
                failed(done, overtaken())
                return done
            snapshot.upload = done
            self._jobs += 1
            order = Upload(
                job=self._jobs,
                store=store,
                folder=folder,
                files=tuple(
                    Source(name=f.name, offset=f.offset, size_bytes=f.size_bytes) for f in snapshot.files
                ),
                retry_s=retry_s,
                calm_s=calm_s,
                mb_per_s=mb_per_s,
            )
            uploader = self._ready()
        uploader.send(order, done, on_trouble)
        return done

    def tell(self, slowdown: float) -> None:
        """Say what a step took, against a quiet one, while an upload is under way, or `NOBODY_STEPS`.

        Never waits, and does nothing where there is no uploader.
        """
        uploader = self._uploader
        if uploader is not None:
            uploader.tell(slowdown)

    def abandon(self, snapshot: Snapshot) -> None:
        """Let go of a snapshot; an uploader that is still at it is ended."""
        with self._lock:
            snapshot.is_current = False
            if snapshot.upload is None or snapshot.upload.done():
                return
            uploader, self._uploader = self._uploader, None
        failed(snapshot.upload, overtaken())
        if uploader is not None:
            uploader.end()

    def close(self) -> None:
        """End the uploader, whatever it is at."""
        with self._lock:
            self._is_closed = True
            uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.end()

    def _ready(self) -> UploaderProcess:
        if self._uploader is None or self._uploader.is_over:
            self._uploader = UploaderProcess(self._arena.fd)
        return self._uploader
