"""Waiting that has an end: a time limit, or the client going away.

One timer of the event loop serves all who wait equally long (`Overdue`). A timer for each would be set and
cancelled by every request, which costs more than reading its headers, and almost none ever fires. Here a wait
costs an entry in a dictionary, of which the first is the next to be overdue.

Lives on one event loop at a time. Knows of requests only how to receive what their client sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Self

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class ClientGone(Exception):
    """The client closed the connection; nobody is left to be answered."""


class Overdue:
    """Those who wait now, and may for the same time.

    Args:
        after_s: how long.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._since_s: dict[_Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self, who: _Waiting, loop: asyncio.AbstractEventLoop) -> None:
        """`who.late()` is called on `loop` unless it leaves in time."""
        self._since_s[who] = loop.time()
        if self._timer is None or self._loop is not loop:
            self._loop = loop
            self._timer = loop.call_later(self._after_s, self._look, loop)

    def leave(self, who: _Waiting) -> None:
        """It no longer waits, late or not."""
        self._since_s.pop(who, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        late = []
        for who, since_s in self._since_s.items():
            if since_s + self._after_s > now_s:
                break
            late.append(who)
        for who in late:
            del self._since_s[who]
        # The timer isn't cancelled when the last one leaves: it looks once in vain, and then is set no more.
        first_s = next(iter(self._since_s.values()), None)
        self._timer = None if first_s is None else loop.call_at(first_s + self._after_s, self._look, loop)
        for who in late:
            who.late()


class _Waiting:
    """`with …: await …`: what is awaited may be broken off, and `breaks_with` raised in its place."""

    __slots__ = ("_broken_off", "_overdue", "_task")
    breaks_with: type[Exception]

    def __init__(self, overdue: Overdue) -> None:
        self._overdue = overdue
        self._broken_off = False

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._overdue.enter(self, loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._overdue.leave(self)
        if self._broken_off and self._task.uncancel() <= 0 and kind is asyncio.CancelledError:
            raise self.breaks_with from None

    def late(self) -> None:
        """It has waited for as long as it may."""
        raise NotImplementedError

    def _break_off(self) -> None:
        self._broken_off = True
        self._task.cancel()


class InTime(_Waiting):
    """`with InTime(overdue): await …` raises TimeoutError there once it is overdue."""

    __slots__ = ()
    breaks_with = TimeoutError

    def late(self) -> None:
        self._break_off()


class WhileConnected(_Waiting):
    """`with WhileConnected(overdue, receive): await …` raises ClientGone there if the client goes away.

    The body must have been read. Watching takes a task of its own, so it begins only when the wait is
    overdue; most requests are answered by then.
    """

    __slots__ = ("_receive", "_watcher")
    breaks_with = ClientGone

    def __init__(self, overdue: Overdue, receive: Receive) -> None:
        super().__init__(overdue)
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        super().__exit__(kind, error, trace)

    def late(self) -> None:
        self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._break_off()
