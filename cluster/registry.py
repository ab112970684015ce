"""The registry: one append-only log a model, of versions registered and aliases moved.

    models/digits/log/00000001.json    {"action": "register", "version": 1, …}
    models/digits/log/00000002.json    {"action": "promote", "alias": "live", "version": 1, …}
    models/digits/log/00000004.json    {"action": "canary", "alias": "live", "version": 2, …}

Each entry carries the aliases as they stand after it, so the newest entry alone answers "what is
live", and an entry is valid only on top of the one before it: two promoters that race both get
their entries in, one after the other, and neither is lost. Versions are immutable; nothing is ever
removed. Who reads follows the log by probing for the entry after the newest one it knows.
"""

from __future__ import annotations

import getpass
import secrets
import socket
from collections.abc import Callable
from hashlib import sha256

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import BadInput, Damaged, NotFound, shown
from cluster.log import Log
from cluster.manifest import Manifest, read_file
from cluster.names import ModelRef, check_name
from cluster.registry_entry import Change, Entry, Target, Version, parsed
from cluster.signature import Signature
from cluster.storage import Store

__all__ = ["MODELS", "Change", "Entry", "Registry", "Target", "Version"]

MODELS = "models"


class _Registered(Exception):
    """The run has a version already."""

    def __init__(self, version: Version) -> None:
        super().__init__(version.version)
        self.version = version


class Registry:
    """The registry in a store.

    Methods that read raise `NotFound` for a model, version or alias that doesn't exist and
    `StorageError` where the store can't be read.
    """

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._clock = clock

    def models(self) -> list[str]:
        """Names of all models, sorted."""
        return self._store.folders(MODELS)

    def newest(self, model: str, known: int = 0) -> Entry | None:
        """The newest entry of a model's log, None where there is none after entry `known`.

        With `known` set, this costs one look-up when nothing has changed.
        """
        log = self._log(model)
        head = log.head(known)
        return parsed(log.read(head), model, head) if head > known else None

    def history(self, model: str) -> list[Entry]:
        """All entries of a model's log, oldest first."""
        log = self._log(model)
        head = log.head()
        if head == 0:
            raise self._no_model(model)
        return [parsed(log.read(number), model, number) for number in range(1, head + 1)]

    def resolve(self, ref: ModelRef) -> Version:
        """The version that `MODEL@ALIAS` or `MODEL@NUMBER` stands for now."""
        return self.version(self._existing(ref.model, self.newest(ref.model)), ref)

    def version(self, newest: Entry, ref: ModelRef) -> Version:
        """As `resolve`, as of the entry `newest`."""
        if ref.version is None:
            return self._entry(ref.model, self.target(newest, ref.alias).entry).version
        if not 1 <= ref.version <= newest.versions:
            raise NotFound(
                f"model '{ref.model}' has no version {ref.version}",
                allowed=f"1 to {newest.versions}",
                fix=f"list them: tandem models show {ref.model}",
            )
        # Counts of versions rise along the log, so a version's entry is a search in a sorted sequence.
        low, high = 1, newest.number
        while low < high:
            middle = (low + high) // 2
            enough = self._entry(ref.model, middle).versions >= ref.version
            low, high = (low, middle) if enough else (middle + 1, high)
        return self._entry(ref.model, low).version

    def register(
        self,
        model: str,
        *,
        manifest_key: str,
        manifest: bytes,
        run: str,
        metrics: dict[str, float],
        why: str,
        once: bool = False,
    ) -> Version:
        """Register a committed servable as the model's next version.

        Args:
            manifest_key: where the servable's manifest is.
            manifest: its bytes; their digest makes the version immutable.
            once: where the run has a version already, however shortly before, give that one instead.
        """
        looked_at = 0

        def make(number: int, newest: Entry | None) -> Change:
            nonlocal looked_at
            for earlier in range(looked_at + 1, number) if once else ():
                entry = self._entry(model, earlier)
                if entry.action == "register" and entry.version.run == run:
                    raise _Registered(entry.version)
            looked_at = number - 1
            count = (newest.versions if newest else 0) + 1
            version = Version(
                model=model,
                version=count,
                manifest_key=manifest_key,
                manifest_sha256=sha256(manifest).hexdigest(),
                run=run,
                metrics=metrics,
                entry=number,
            )
            return Change("register", version, count, newest.aliases if newest else {})

        try:
            return self.append(model, why, make).version
        except _Registered as found:
            return found.version

    def promote(self, model: str, alias: str, version: int, *, why: str) -> Entry:
        """Point `alias` at `version`."""
        check_name(alias, "alias")
        if alias.isdigit():
            raise BadInput("an alias can't be a number", got=shown(alias), allowed="a name such as live")

        def make(number: int, newest: Entry | None) -> Change:
            newest = self._existing(model, newest)
            now = newest.aliases.get(alias)
            # Promoting what is promoted moves nothing, so a rollback must not come back to it.
            again = now is not None and now.version == version
            before = (now.before if again else now.entry) if now else None
            target = Target(version=version, entry=number, before=before)
            found = self.version(newest, ModelRef(model, str(version)))
            return Change("promote", found, newest.versions, {**newest.aliases, alias: target}, alias)

        return self.append(model, why, make)

    def rollback(self, model: str, alias: str, *, why: str) -> Entry:
        """Point `alias` back at the version it pointed at before its last move.

        Raises:
            BadInput: it has only ever pointed at one version, or a candidate is tried beside it.
        """

        def make(number: int, newest: Entry | None) -> Change:
            newest = self._existing(model, newest)
            now = self.target(newest, alias)
            if now.trial is not None:
                raise BadInput(
                    f"version {now.trial.version} is tried beside '{model}@{alias}'; end that first",
                    fix=f"tandem models abandon {model} --alias {alias}, then roll back if you still mean to",
                )
            if now.before is None:
                raise BadInput(
                    f"'{model}@{alias}' has no earlier version to go back to",
                    got=f"version {now.version}, its first",
                    fix=f"name a version: tandem models promote {model} VERSION --alias {alias}",
                )
            earlier = self._entry(model, now.before)
            # A second rollback goes one further back, not forth again.
            further = earlier.aliases[alias].before
            target = Target(version=earlier.version.version, entry=number, before=further)
            aliases = {**newest.aliases, alias: target}
            return Change("rollback", earlier.version, newest.versions, aliases, alias)

        return self.append(model, why, make)

    def candidate(self, newest: Entry, alias: str) -> Version | None:
        """The version tried beside `alias` as of the entry `newest`, None where none is."""
        target = newest.aliases.get(alias)
        if target is None or target.trial is None:
            return None
        return self.version(newest, ModelRef(newest.model, str(target.trial.version)))

    def servable(self, version: Version) -> tuple[Manifest, Signature]:
        """The manifest and signature of a version's servable, verified.

        Raises:
            Damaged: either was changed since the version was registered.
        """
        data = self._store.get(version.manifest_key)
        if sha256(data).hexdigest() != version.manifest_sha256:
            raise Damaged(
                f"the servable of {version.model} version {version.version} was changed",
                got=f"manifest SHA-256 {sha256(data).hexdigest()}",
                allowed=version.manifest_sha256,
                fix="promote another version, and find out who wrote to the store",
            )
        manifest = Manifest.model_validate_json(data)
        signature = Signature.model_validate_json(read_file(self._store, manifest, "signature.json"))
        return manifest, signature

    def append(self, model: str, why: str, make: Callable[[int, Entry | None], Change]) -> Entry:
        """Append what `make(number, newest entry)` gives, anew each time a race is lost.

        Raises:
            Whatever `make` raises: nothing is written then.
        """
        check_name(model, "model")
        nonce = secrets.token_hex(8)

        def entry_bytes(number: int, previous: bytes | None) -> bytes:
            newest = parsed(previous, model, number - 1) if previous is not None else None
            entry = Entry(
                number=number,
                nonce=nonce,
                model=model,
                who=_who(),
                why=why,
                at=self._clock.wall(),
                **make(number, newest)._asdict(),
            )
            # What is None is left out: earlier releases refuse fields that they don't know.
            return entry.model_dump_json(indent=1, exclude_none=True).encode()

        number, data = self._log(model).append(entry_bytes)
        return parsed(data, model, number)

    def _entry(self, model: str, number: int) -> Entry:
        return parsed(self._log(model).read(number), model, number)

    @staticmethod
    def target(newest: Entry, alias: str) -> Target:
        """What an alias points at as of the entry `newest`.

        Raises:
            NotFound: there is no such alias.
        """
        if alias in newest.aliases:
            return newest.aliases[alias]
        raise NotFound(
            f"model '{newest.model}' has no alias '{alias}'",
            allowed=", ".join(sorted(newest.aliases)) or "none was ever set",
            fix=f"set it: tandem models promote {newest.model} VERSION --alias {alias}",
        )

    def _existing(self, model: str, newest: Entry | None) -> Entry:
        if newest is None:
            raise self._no_model(model)
        return newest

    def _no_model(self, model: str) -> NotFound:
        return NotFound(
            f"no model '{model}' in {self._store.uri}",
            fix="train one, or list what there is: tandem models --store URI",
        )

    def _log(self, model: str) -> Log:
        return Log(self._store, f"{MODELS}/{check_name(model, 'model')}/log")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id need not have a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
