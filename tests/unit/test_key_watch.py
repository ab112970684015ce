"""A door's tenants follow the log of keys, and hold on where the store is away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import BadInput, StorageError, Unauthorized
from cluster.keys import Entry, Keys, Limits
from cluster.storage import memory_store, open_store
from serving.guard import Guard
from serving.key_watch import KeyWatch
from serving.run import with_keys_settled
from serving.service import Service


def at_once(function: Callable[..., Any], *arguments: Any) -> None:
    function(*arguments)


def knows(guard: Guard, text: str) -> bool:
    try:
        with guard.admit({b"x-api-key": text.encode()}):
            return True
    except Unauthorized:
        return False


class Unreliable(Keys):
    """Keys whose store can be away."""

    away = False

    def newest(self, known: int = 0) -> Entry | None:
        """The newest entry.

        Raises:
            StorageError: while the store is away.
        """
        if self.away:
            raise StorageError("the store is away")
        return super().newest(known)


def test_new_and_revoked_keys_are_noticed() -> None:
    keys = Keys(memory_store())
    watch = KeyWatch(keys, on_loop=at_once)
    made = keys.create("team")
    assert not knows(watch.guard, made.text)
    watch.look()
    assert knows(watch.guard, made.text)
    keys.revoke(made.id)
    watch.look()
    assert not knows(watch.guard, made.text)


def test_known_keys_hold_while_the_store_is_away() -> None:
    keys = Unreliable(memory_store())
    made = keys.create("team")
    watch = KeyWatch(keys, on_loop=at_once)
    keys.away = True
    watch.look()
    assert knows(watch.guard, made.text)


def test_replicas_are_counted_only_for_limits_and_never_raise() -> None:
    keys = Keys(memory_store())
    counted: list[int] = []

    def replicas() -> int:
        counted.append(3)
        if len(counted) > 1:
            raise RuntimeError("the controller is away")
        return 3

    made = keys.create("team")
    watch = KeyWatch(keys, on_loop=at_once, replicas=replicas)
    watch.count()
    assert not counted
    keys.limit("team", Limits(max_in_flight=3))
    watch.look()
    watch.count()
    watch.count()
    assert len(counted) == 2
    with (
        watch.guard.admit({b"x-api-key": made.text.encode()}),
        pytest.raises(Exception, match="in flight"),
        watch.guard.admit({b"x-api-key": made.text.encode()}),
    ):
        pass


def test_keys_are_asked_for_beyond_loopback(tmp_path: Any) -> None:
    store = f"file://{tmp_path}"
    service = Service.model_validate({"store": store, "models": [{"model": "digits@live"}]})
    assert with_keys_settled(service, "127.0.0.1").keys == "off"
    with pytest.raises(BadInput, match="a key"):
        with_keys_settled(service, "0.0.0.0")
    Keys(open_store(store)).create("team")
    assert with_keys_settled(service, "0.0.0.0").keys == "required"
    off = service.model_copy(update={"keys": "off"})
    assert with_keys_settled(off, "0.0.0.0").keys == "off"
