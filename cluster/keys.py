"""API keys of a store's services: who may ask, and how much.

    keys/log/00000001.json        every tenant and key as they stand after this entry

A tenant is whoever is counted together: a team, a customer, an application. It has one key or several, so
that a key can be replaced without an interruption, and limits that hold for all of its keys together. A
store's services share its tenants.

A key is `tandem_ID_SECRET`. The secret is 256 random bits and is shown once, when it is made; the store
has its SHA-256. (Slow hashes protect what people choose and remember; nobody guesses 256 random bits.) The
id is no secret: it says which hash to compare with, and what to revoke.

Knows nothing of HTTP; `serving.guard` asks callers for their keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from pydantic import Field, ValidationError

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import BadInput, Damaged, NotFound, shown
from cluster.log import Log
from cluster.names import Name, check_name
from cluster.storage import Store

LOG_PREFIX = "keys/log"
PREFIX = "tandem"
_ID_BYTES = 6
_SECRET_BYTES = 32
_NO_SUCH_KEY = "0" * 64
"""Compared with where the id is unknown, so that an unknown id takes as long as a wrong secret."""


class Limits(Frozen):
    """What a tenant may use of a service, all replicas together; None: no limit."""

    requests_per_s: float | None = Field(None, gt=0, le=1e9)
    burst: int | None = Field(None, ge=1, le=10**9)
    """Requests that may come at once after a pause; by default what two seconds bring."""
    max_in_flight: int | None = Field(None, ge=1, le=10**6)


class StoredKey(Frozen):
    """A key as the store has it."""

    id: str
    sha256: str
    """Of the secret, in hexadecimal."""
    made_at: datetime


class Tenant(Frozen):
    """Who is counted together."""

    name: Name
    keys: tuple[StoredKey, ...] = ()
    limits: Limits = Limits()


class Entry(Frozen):
    """One entry of the log."""

    number: int
    what: str
    at: datetime
    tenants: tuple[Tenant, ...]
    """All of them, sorted by name, as they stand after this entry."""


class NewKey(NamedTuple):
    """A key that has just been made. `text` is what the client sends, and is nowhere else."""

    tenant: str
    id: str
    text: str


class Keys:
    """The tenants of a store.

    Methods raise `StorageError` where the store fails, `Damaged` where the log was changed by others.
    """

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        self._log = Log(store, LOG_PREFIX)
        self._clock = clock

    def newest(self, known: int = 0) -> Entry | None:
        """The newest entry, None where there is none after entry `known`."""
        head = self._log.head(known)
        return _parsed(self._log.read(head), head) if head > known else None

    def tenants(self) -> tuple[Tenant, ...]:
        """Every tenant, sorted by name."""
        newest = self.newest()
        return newest.tenants if newest else ()

    def create(self, tenant: str, limits: Limits | None = None) -> NewKey:
        """Make a key, and the tenant too where it is new. `limits` replace those it has.

        Raises:
            BadName: not a name.
        """
        check_name(tenant, "tenant")
        id_, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
        stored = StoredKey(id=id_, sha256=_hash(secret), made_at=self._clock.wall())

        def change(tenants: dict[str, Tenant]) -> str:
            before = tenants.get(tenant, Tenant(name=tenant))
            update = {"keys": (*before.keys, stored), "limits": limits or before.limits}
            tenants[tenant] = before.model_copy(update=update)
            return f"key {id_} for {tenant}"

        self._append(change)
        return NewKey(tenant, id_, f"{PREFIX}_{id_}_{secret}")

    def limit(self, tenant: str, limits: Limits) -> None:
        """Replace a tenant's limits.

        Raises:
            NotFound: no such tenant.
        """

        def change(tenants: dict[str, Tenant]) -> str:
            if tenant not in tenants:
                raise NotFound(
                    f"there is no tenant {shown(tenant)}",
                    allowed=", ".join(tenants) or "there is none yet",
                    fix=f"make a key for it: tandem keys create {tenant}",
                )
            tenants[tenant] = tenants[tenant].model_copy(update={"limits": limits})
            return f"limits of {tenant}"

        self._append(change)

    def revoke(self, id_: str) -> str:
        """Make a key worthless, and forget a tenant with its last key; gives the tenant's name.

        Raises:
            NotFound: no such key.
        """
        holder: list[str] = []

        def change(tenants: dict[str, Tenant]) -> str:
            holder[:] = [t.name for t in tenants.values() if any(key.id == id_ for key in t.keys)]
            if not holder:
                raise NotFound(
                    "there is no such key",
                    got=shown(id_),
                    allowed="an id, the middle part of a key",
                    fix="see which there are: tandem keys",
                )
            tenant = tenants.pop(holder[0])
            left = tuple(key for key in tenant.keys if key.id != id_)
            if left:
                tenants[tenant.name] = tenant.model_copy(update={"keys": left})
            return f"key {id_} of {tenant.name} revoked"

        self._append(change)
        return holder[0]

    def _append(self, change: Callable[[dict[str, Tenant]], str]) -> None:
        def entry_bytes(number: int, previous: bytes | None) -> bytes:
            before = _parsed(previous, number - 1).tenants if previous is not None else ()
            tenants = {tenant.name: tenant for tenant in before}
            what = change(tenants)
            entry = Entry(
                number=number,
                what=what,
                at=self._clock.wall(),
                tenants=tuple(tenants[name] for name in sorted(tenants)),
            )
            return entry.model_dump_json(indent=1).encode()

        self._log.append(entry_bytes)


class Keyring:
    """Tells whose key a text is. Immutable; costs a hash per question."""

    def __init__(self, tenants: tuple[Tenant, ...]) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._by_id = {key.id: (key.sha256, tenant) for tenant in tenants for key in tenant.keys}

    def tenant(self, text: str) -> Tenant | None:
        """The tenant that a key belongs to, None where it is nobody's. Takes as long either way."""
        prefix, _, rest = text.partition("_")
        id_, _, secret = rest.partition("_")
        expected, tenant = self._by_id.get(id_, (_NO_SUCH_KEY, None))
        same = hmac.compare_digest(_hash(secret), expected)
        return tenant if same and prefix == PREFIX else None


def parse_limits(requests_per_s: float | None, burst: int | None, max_in_flight: int | None) -> Limits | None:
    """Limits from the command line, None where none was given.

    Raises:
        BadInput: a number is out of bounds.
    """
    if requests_per_s is None and burst is None and max_in_flight is None:
        return None
    try:
        return Limits(requests_per_s=requests_per_s, burst=burst, max_in_flight=max_in_flight)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"limit '{first['loc'][0]}' can't be that", got=shown(first["input"]), allowed=str(first["msg"])
        ) from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parsed(data: bytes, number: int) -> Entry:
    try:
        return Entry.model_validate_json(data)
    except ValidationError as error:
        raise Damaged(
            f"entry {number} of the log of keys can't be understood",
            got=shown(str(error.errors()[0]["msg"])),
            fix="it was changed after it was written: restore it",
        ) from None
