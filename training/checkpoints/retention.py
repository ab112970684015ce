"""Which checkpoints keep their files: the newest, the best, the pinned. The others' are deleted.

Manifests stay, as the record of what was done; a manifest whose files are gone is passed over by
whoever reads. Files that no manifest names, left by attempts that lost or died, are swept too, but only
where the log has a later attempt in the place that they were for: whoever made them would, if it still
lives, be refused there (cluster.artifacts), so nothing will ever name them. Attempts whose name doesn't
tell when they were are left alone.

Everything here may fail half-way, or be done by two processes at once: deleting is repeatable, and what
is left over is found by the next look through the store. No clock is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from cluster.attempts import FIRST_WRITER, Attempt
from cluster.errors import Damaged, NotFound, StorageError, TandemError
from cluster.manifest import Manifest
from cluster.pins import Pins
from cluster.runs import Run
from training.recipe import Checkpointing

_LOOK_THROUGH_EVERY = 50
"""Commits between two listings of the store, which catch up what failed or was left behind meanwhile."""

_log = logging.getLogger(__name__)


class _Checkpoint(NamedTuple):
    """One whose files are, or may be, in the store."""

    keys: tuple[str, ...]
    loss: float | None


class _Entry(NamedTuple):
    """What matters of a manifest when an attempt is looked for."""

    nonce: str
    attempt: Attempt


class Retention:
    """Keeps one run's checkpoints down to what its policy says. For one thread at a time."""

    def __init__(self, run: Run, policy: Checkpointing) -> None:
        self._run = run
        self._policy = policy
        self._artifacts = run.checkpoints()
        self._folder = f"{run.prefix}/checkpoints/"
        self._pins = Pins(run)
        self._present: dict[int, _Checkpoint] = {}
        self._entries: dict[int, _Entry | None] = {}
        self._orphans: set[str] = set()
        self._seen = 0
        self._looks_in = 0

    def after_commit(self, manifest: Manifest) -> list[int]:
        """Delete what is not kept now that `manifest` stands.

        Never raises for what the store does: what could not be deleted is tried again next time.

        Returns:
            The checkpoints whose files are all deleted now, oldest first.
        """
        try:
            self._learn(manifest)
            doomed = sorted(self._present.keys() - self._kept(manifest.number))
            needed = {
                key for number in self._present.keys() - set(doomed) for key in self._present[number].keys
            }
        except TandemError as error:
            _log.warning("checkpoints are not cleaned up this time: %s", error.failed)
            self._looks_in = 0
            return []
        self._orphans -= self._deleted(key for key in self._orphans if key not in needed)
        gone = []
        for number in doomed:
            keys = self._present[number].keys
            if self._deleted(key for key in keys if key not in needed).issuperset(set(keys) - needed):
                del self._present[number]
                gone.append(number)
        return gone

    def _kept(self, head: int) -> set[int]:
        """The numbers that stay, of those up to `head`; whatever is newer stays."""
        numbers = sorted(number for number in self._present if number <= head)
        losses = {number: loss for number in numbers if (loss := self._present[number].loss) is not None}
        best = sorted(losses, key=lambda number: (losses[number], -number))[: self._policy.keep_best]
        newer = {number for number in self._present if number > head}
        return {*numbers[-self._policy.keep :], *best, *self._pins.all(), *newer}

    def _learn(self, manifest: Manifest) -> None:
        """Take note of what came since the last time, the first time and now and then of everything."""
        if self._looks_in == 0:
            self._look_through(manifest)
            self._looks_in = _LOOK_THROUGH_EVERY
        else:
            for number in range(self._seen + 1, manifest.number):
                self._note(number)
        self._looks_in -= 1
        self._add(manifest)
        self._seen = manifest.number

    def _note(self, number: int) -> _Entry | None:
        """Entry `number` of the log, read once; None where it is damaged."""
        if number not in self._entries:
            try:
                self._add(self._artifacts.read(number))
            except (Damaged, NotFound):
                self._entries[number] = None
        return self._entries[number]

    def _add(self, manifest: Manifest) -> None:
        before_all_of_its_writer = Attempt(manifest.writer or FIRST_WRITER, -1)
        attempt = None if manifest.is_fence else Attempt.parse(manifest.nonce)
        self._entries[manifest.number] = _Entry(manifest.nonce, attempt or before_all_of_its_writer)
        if not manifest.is_fence:
            loss = manifest.meta.get("loss")
            keys = tuple(entry.key for entry in manifest.files.values())
            self._present[manifest.number] = _Checkpoint(
                keys, loss if isinstance(loss, float | int) else None
            )

    def _look_through(self, newest: Manifest) -> None:
        """List the store: which checkpoints have files, and which files belong to none."""
        attempts: dict[tuple[int, str], list[str]] = {}
        for key in self._run.store.keys(self._folder):
            folder, _, rest = key.removeprefix(self._folder).partition("/")
            nonce, _, file = rest.partition("/")
            if file and folder.isdecimal() and int(folder) <= newest.number:
                attempts.setdefault((int(folder), nonce), []).append(key)
        self._entries, self._present, self._orphans = {}, {}, set()
        self._add(newest)
        found = set()
        for (number, nonce), keys in attempts.items():
            published = self._publication(number, nonce, newest.number)
            if published is None:
                self._orphans.update(keys)
            elif published:
                found.add(published)
        # Manifests were read that have no files any more.
        self._present = {number: self._present[number] for number in found & self._present.keys()}

    def _publication(self, folder: int, nonce: str, head: int) -> int | None:
        """The number under which the attempt `nonce` stands; None if it never will, 0 if that can't be told.

        It stands at the number it was uploaded for, or at the next one that no older attempt had taken.
        """
        attempt = Attempt.parse(nonce)
        for number in range(folder, head + 1):
            entry = self._note(number)
            if entry is None:
                return 0
            if entry.nonce == nonce:
                return number
            if attempt is not None and attempt.is_before(entry.attempt):
                return None
        return 0

    def _deleted(self, keys: Iterable[str]) -> set[str]:
        """Delete objects; gives those that are gone."""
        gone = set()
        for key in keys:
            try:
                self._run.store.delete([key])
            except StorageError as error:
                _log.warning("'%s' is not deleted, it is tried again later: %s", key, error.got)
                self._looks_in = 0
                break  # a store that fails would take its time over each of them
            gone.add(key)
        return gone
