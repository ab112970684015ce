"""Who is let in: API keys, and what each tenant may use.

A request is asked for its key before a byte of its body is read. Health and readiness answer without one,
since those who probe have none; everything else of a service, its metrics too, needs one.

A tenant's limits are for the service as a whole. Replicas don't talk to each other: each holds a tenant to
its share, the limit divided by the replicas that run, which is exact where requests are spread evenly (as
HAProxy does) and strict rather than lax where they aren't.

Knows neither the store nor HTTP beyond header names. Lives on one event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import RateLimited, Unauthorized
from cluster.keys import Keyring, Limits, Tenant

_BEARER = b"bearer "
_MAX_KEY_CHARS = 256
_BURST_S = 2.0
"""What a tenant without a `burst` may send at once: this long's requests."""
_IN_FLIGHT_RETRY_S = 1.0


@dataclass(slots=True)
class _Usage:
    """What a tenant uses of this replica now: a token bucket, and requests in flight."""

    tokens: float
    filled_at_s: float
    in_flight: int = 0


class Guard:
    """The door of one replica.

    Args:
        tenants: as the log of keys has them.
        replicas: how many replicas share the limits.
    """

    def __init__(
        self, tenants: tuple[Tenant, ...] = (), *, replicas: int = 1, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}
        self._replicas = max(1, replicas)
        self.replace(tenants)

    @property
    def limits_anyone(self) -> bool:
        """Whether any tenant has a limit, so that the number of replicas matters."""
        return any(tenant.limits != Limits() for tenant in self._ring.tenants.values())

    def replace(self, tenants: tuple[Tenant, ...]) -> None:
        """From here on these are the tenants; who is inside stays inside."""
        self._ring = Keyring(tenants)
        self._usage = {name: used for name, used in self._usage.items() if name in self._ring.tenants}

    def share_with(self, replicas: int) -> None:
        """How many replicas run, this one included."""
        self._replicas = max(1, replicas)

    @contextmanager
    def admit(self, headers: dict[bytes, bytes]) -> Iterator[str]:
        """Let a request in until the `with` ends; gives the tenant's name.

        Raises:
            Unauthorized: no key, or one that is nobody's.
            RateLimited: the tenant is over a limit.
        """
        tenant = self._tenant(headers)
        usage = self._use(tenant)
        usage.in_flight += 1
        try:
            yield tenant.name
        finally:
            usage.in_flight -= 1

    def _tenant(self, headers: dict[bytes, bytes]) -> Tenant:
        text = _key(headers)
        if text is None:
            raise Unauthorized(
                "a key is needed",
                allowed="'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                fix="whoever runs the service makes one: tandem keys create TENANT",
            )
        tenant = self._ring.tenant(text)
        if tenant is None:
            raise Unauthorized(
                "the key isn't valid",
                allowed="one that was made for this store and hasn't been revoked",
                fix="whoever runs the service makes one: tandem keys create TENANT",
            )
        return tenant

    def _use(self, tenant: Tenant) -> _Usage:
        limits, now_s = tenant.limits, self._clock.monotonic_s()
        usage = self._usage.get(tenant.name)
        if usage is None:
            usage = self._usage[tenant.name] = _Usage(math.inf, now_s)
        if limits.max_in_flight is not None:
            share = math.ceil(limits.max_in_flight / self._replicas)
            if usage.in_flight >= share:
                raise RateLimited(
                    f"tenant '{tenant.name}' has too many requests in flight",
                    retry_after_s=_IN_FLIGHT_RETRY_S,
                    allowed=f"{limits.max_in_flight} at the same time",
                    fix="wait for answers before you send more",
                )
        if limits.requests_per_s is not None:
            self._take_token(tenant, usage, limits.requests_per_s / self._replicas, now_s)
        return usage

    def _take_token(self, tenant: Tenant, usage: _Usage, rate_per_s: float, now_s: float) -> None:
        limits = tenant.limits
        burst = rate_per_s * _BURST_S if limits.burst is None else limits.burst / self._replicas
        room = max(1.0, burst)
        usage.tokens = min(room, usage.tokens + (now_s - usage.filled_at_s) * rate_per_s)
        usage.filled_at_s = now_s
        if usage.tokens < 1:
            raise RateLimited(
                f"tenant '{tenant.name}' sends too many requests",
                retry_after_s=(1 - usage.tokens) / rate_per_s,
                allowed=f"{limits.requests_per_s:g} requests a second",
                fix="send them more slowly, or ask for a higher limit",
            )
        usage.tokens -= 1


def _key(headers: dict[bytes, bytes]) -> str | None:
    given = headers.get(b"x-api-key")
    if given is None:
        authorization = headers.get(b"authorization", b"")
        if authorization[: len(_BEARER)].lower() != _BEARER:
            return None
        given = authorization[len(_BEARER) :]
    text = given.strip().decode("latin-1")
    return text if 0 < len(text) <= _MAX_KEY_CHARS else None
