"""Checkpoints that are never deleted: those a person pinned, and those a servable was made of.

    runs/RUN/pins/00000007        an empty object: checkpoint 7 stays

A servable's manifest says which checkpoint it was made of, and versions in the registry are servables,
so a checkpoint that a version stands on is kept without anyone pinning it.
"""

from __future__ import annotations

from cluster.errors import NotFound, shown
from cluster.runs import Run


class Pins:
    """The pins of one run.

    Methods raise `StorageError` where the store fails.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._prefix = f"{run.prefix}/pins"
        self._of_servables: dict[int, int | None] = {}
        """By the servable's number: manifests never change, so each is read once."""

    def add(self, number: int) -> None:
        """Keep a checkpoint, whatever the run's policy says.

        Raises:
            NotFound: there is no such checkpoint, or its files are deleted already.
            Damaged: its manifest is not what was written.
        """
        checkpoints = self._run.checkpoints()
        head = checkpoints.head()
        manifest = checkpoints.read(number) if 1 <= number <= head else None
        if manifest is None or manifest.is_fence:
            raise NotFound(
                f"run '{self._run.name}' has no such checkpoint",
                got=shown(number),
                allowed=f"1 to {head}" if head else "it has none yet",
                fix=f"see which there are: tandem runs show {self._run.name}",
            )
        # Pinned first, looked at then: the other way round, it might be deleted between the two.
        self._run.store.put(self._key(number), b"")
        gone = [e.key for e in manifest.files.values() if self._run.store.size_bytes(e.key) is None]
        if gone:
            self.remove(number)
            raise NotFound(
                f"the files of checkpoint {number} are deleted already",
                got=f"{len(gone)} of {len(manifest.files)} are gone, such as '{gone[0]}'",
                allowed="one that the run still keeps (checkpoint.keep, checkpoint.keep_best)",
                fix="pin a newer one",
            )

    def remove(self, number: int) -> None:
        """Leave a checkpoint to the run's policy again; one that isn't pinned is passed over."""
        self._run.store.delete([self._key(number)])

    def numbers(self) -> set[int]:
        """The checkpoints that are pinned by name."""
        names = (key.rsplit("/", 1)[-1] for key in self._run.store.keys(self._prefix))
        return {int(name) for name in names if name.isdecimal()}

    def all(self) -> set[int]:
        """The checkpoints that may not be deleted, for whatever reason.

        Raises:
            Damaged: a servable's manifest is not what was written, so nobody knows what it needs.
        """
        servables = self._run.servables()
        known = max(self._of_servables, default=0)
        for number in range(known + 1, servables.head(known) + 1):
            checkpoint = servables.read(number).meta.get("checkpoint")
            self._of_servables[number] = checkpoint if isinstance(checkpoint, int) else None
        return self.numbers() | {number for number in self._of_servables.values() if number is not None}

    def _key(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}"
