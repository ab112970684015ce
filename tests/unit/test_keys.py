"""API keys: made, found, revoked; limits hold, and are shared."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput, BadName, NotFound, RateLimited, Unauthorized
from cluster.keys import Keyring, Keys, Limits, parse_limits
from cluster.storage import memory_store
from serving.guard import Guard


class FakeClock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        """Seconds since some moment."""
        return self.now_s

    def wall(self) -> datetime:
        """The same moment always."""
        return datetime(2026, 1, 1, tzinfo=UTC)

    def sleep(self, seconds: float) -> None:
        """Passes at once."""
        self.now_s += seconds


def test_a_key_is_known_until_it_is_revoked() -> None:
    keys = Keys(memory_store(), FakeClock())
    first, second = keys.create("team-a"), keys.create("team-b")
    ring = Keyring(keys.tenants())
    found = [ring.tenant(first.text), ring.tenant(second.text)]
    assert [tenant and tenant.name for tenant in found] == ["team-a", "team-b"]

    assert keys.revoke(first.id) == "team-a"
    ring = Keyring(keys.tenants())
    assert ring.tenant(first.text) is None
    assert ring.tenant(second.text) is not None
    assert [tenant.name for tenant in keys.tenants()] == ["team-b"]


def test_a_tenant_with_two_keys_outlives_one() -> None:
    keys = Keys(memory_store(), FakeClock())
    old, new = keys.create("team", Limits(max_in_flight=3)), keys.create("team")
    keys.revoke(old.id)
    tenant = Keyring(keys.tenants()).tenant(new.text)
    assert tenant is not None
    assert tenant.limits.max_in_flight == 3


def test_the_store_never_sees_a_secret() -> None:
    store = memory_store()
    made = Keys(store, FakeClock()).create("team")
    secret = made.text.rsplit("_", 1)[-1].encode()
    assert all(secret not in store.get(key) for key in store.keys("keys"))


def test_mistakes_are_explained() -> None:
    keys = Keys(memory_store(), FakeClock())
    with pytest.raises(BadName):
        keys.create("No Such Name")
    with pytest.raises(NotFound, match="no such key"):
        keys.revoke("0123")
    with pytest.raises(NotFound, match="no tenant"):
        keys.limit("nobody", Limits())
    with pytest.raises(BadInput, match="max_in_flight"):
        parse_limits(None, None, 0)
    assert keys.newest() is None


@given(st.text(max_size=80))
def test_no_text_but_the_key_is_a_key(text: str) -> None:
    keys = Keys(memory_store(), FakeClock())
    made = keys.create("team")
    ring = Keyring(keys.tenants())
    wrong = [
        text,
        made.text + text + "x",
        made.text[: len(text) % len(made.text)],
        f"tandem_{made.id}_{text}",
    ]
    assert all(ring.tenant(one) is None for one in wrong)


def test_a_guard_asks_for_a_key() -> None:
    keys = Keys(memory_store(), FakeClock())
    made = keys.create("team")
    guard = Guard(keys.tenants())
    for headers in ({}, {b"authorization": b"Basic abc"}, {b"x-api-key": b""}, {b"x-api-key": b"k" * 300}):
        with pytest.raises(Unauthorized, match="a key is needed"), guard.admit(headers):
            pass
    with pytest.raises(Unauthorized, match="isn't valid") as raised, guard.admit({b"x-api-key": b"wrong"}):
        pass
    assert "wrong" not in str(raised.value)
    for headers in ({b"x-api-key": made.text.encode()}, {b"authorization": b"bearer " + made.text.encode()}):
        with guard.admit(headers) as tenant:
            assert tenant == "team"


def test_requests_in_flight_are_counted_and_shared() -> None:
    keys = Keys(memory_store(), FakeClock())
    made = keys.create("team", Limits(max_in_flight=2))
    guard = Guard(keys.tenants())
    headers = {b"x-api-key": made.text.encode()}
    with guard.admit(headers), guard.admit(headers):
        with pytest.raises(RateLimited, match="in flight"), guard.admit(headers):
            pass
        guard.share_with(2)
    with guard.admit(headers), pytest.raises(RateLimited), guard.admit(headers):
        pass


def test_a_bucket_fills_with_time() -> None:
    clock = FakeClock()
    keys = Keys(memory_store(), clock)
    made = keys.create("team", Limits(requests_per_s=10, burst=3))
    guard = Guard(keys.tenants(), clock=clock)
    headers = {b"x-api-key": made.text.encode()}

    def admitted(tries: int) -> int:
        count = 0
        for _ in range(tries):
            with suppress(RateLimited), guard.admit(headers):
                count += 1
        return count

    assert admitted(5) == 3
    with pytest.raises(RateLimited) as raised, guard.admit(headers):
        pass
    assert 0 < raised.value.retry_after_s <= 0.1
    clock.sleep(0.2)
    assert admitted(5) == 2
    clock.sleep(60)
    assert admitted(5) == 3
    guard.share_with(2)  # 5/s, 1.5 at once
    clock.sleep(60)
    assert admitted(5) == 1


def test_limits_change_without_forgetting_who_is_inside() -> None:
    keys = Keys(memory_store(), FakeClock())
    made = keys.create("team")
    guard = Guard(keys.tenants())
    headers = {b"x-api-key": made.text.encode()}
    assert not guard.limits_anyone
    with guard.admit(headers):
        keys.limit("team", Limits(max_in_flight=1))
        guard.replace(keys.tenants())
        assert guard.limits_anyone
        with pytest.raises(RateLimited), guard.admit(headers):
            pass
