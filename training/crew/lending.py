"""Asking a run that trains now, from outside of it: lend workers, take them back, say how it stands.

The run's coordinator is an actor with a name; this finds it, on the cluster that is named
or on any local Ray of this machine. Knows nothing of how workers are freed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from cluster.connection import connect
from cluster.errors import BadInput, NotFound, TandemError, shown
from cluster.local import running
from cluster.location import Location

_ANSWER_S = 60.0
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def coordinator_name(run_name: str, store: str) -> str:
    """Under which the coordinator of a run is found, in Tandem's namespace.

    Args:
        store: the URI, however it is spelled; runs of one name in two stores have nothing in common.
    """
    digest = hashlib.sha256(Location.parse(store).uri.encode()).hexdigest()
    return f"{_prefix(run_name)}{digest[:16]}"


def named_so(names: Iterable[str], run_name: str, store: str | None) -> list[str]:
    """Those of the actors' names that are coordinators of the run: in that store, or in any."""
    if store is not None:
        return [name for name in names if name == coordinator_name(run_name, store)]
    return [name for name in names if name.startswith(_prefix(run_name))]


def seconds(text: str) -> float:
    """A length of time such as `90s`, `10m` or `1.5h`, in seconds.

    Raises:
        BadInput: it is not one, or not positive.
    """
    number, unit = text[:-1], text[-1:]
    try:
        value = float(number) * _UNITS_S[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise BadInput(
            "not a length of time", got=shown(text), allowed="90s, 10m, 1.5h", fix="say it as in --for 10m"
        )
    return value


def lend(
    run_name: str, workers: int, for_s: float, address: str | None, store: str | None = None
) -> dict[str, Any]:
    """Have a run do with fewer workers for a while; returns once their resources are free.

    Args:
        for_s: how long, counted from then.
        store: the run's; needed only where runs of one name from several stores train at once.

    Raises:
        NotFound: no such run trains now.
        BadInput: it can't spare so many, or several runs are called so.
    """
    return dict(_ask(run_name, address, store, lambda crew: crew.lend.remote(workers, for_s)))


def take_back(run_name: str, address: str | None, store: str | None = None) -> None:
    """End a loan before its time.

    Raises:
        NotFound: no such run trains now.
        BadInput: several runs are called so.
    """
    _ask(run_name, address, store, lambda crew: crew.take_back.remote())


def status(run_name: str, address: str | None, store: str | None = None) -> dict[str, Any]:
    """Where a run that trains now stands.

    Raises:
        NotFound: no such run trains now.
        BadInput: several runs are called so.
    """
    return dict(_ask(run_name, address, store, lambda crew: crew.status.remote()))


def _prefix(run_name: str) -> str:
    return f"coordinator:{run_name}:"


def _ask(run_name: str, address: str | None, store: str | None, ask: Callable[[Any], Any]) -> Any:
    import ray

    for connection in _connections(address):
        with connection:
            found = named_so(ray.util.list_named_actors(), run_name, store)
            if len(found) > 1:
                raise BadInput(
                    f"{len(found)} runs called '{run_name}' train here",
                    got="no store",
                    allowed="the store of one of them",
                    fix="say which: --store URI, as in its recipe",
                )
            try:
                crew = ray.get_actor(found[0]) if found else None
            except ValueError:  # it has just ended
                crew = None
            if crew is None:
                continue
            try:
                return ray.get(ask(crew), timeout=_ANSWER_S)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, TandemError):
                    raise error.cause from None
                raise
    raise NotFound(
        f"run '{run_name}' doesn't train now",
        got=f"no coordinator of that name on {address or 'any local Ray of this machine'}",
        fix="name the cluster it trains on: --address HOST:PORT",
    )


def _connections(address: str | None) -> Iterator[AbstractContextManager[str]]:
    if address is not None:
        yield connect(address)
    else:
        for local in running():
            if local.alive and local.record.address is not None:
                yield connect(None, local=local)
