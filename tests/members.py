"""Training processes ordered about by a test, as a keeper would: no Ray, no nursery."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from training.crew.messages import Beat, Failed, Hosting, Join, Leave, Spec, Told, parse_saying, send
from training.recipe import Recipe

TESTS = Path(__file__).parent
_PROGRAM = """
import os, socket, sys
from training.member import live
from training.crew.messages import Spec
live(socket.socket(fileno=int(sys.argv[1])), Spec.model_validate_json(sys.argv[2]))
os._exit(0)
"""
PATIENCE_S = 60.0

S = TypeVar("S")


class MemberProcess:
    """One member. `heard` has all that it says, but for beats and progress."""

    def __init__(
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        name: str,
        *,
        within: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        hear: Callable[[str, Any], None] | None = None,
    ) -> None:
        """`within` is a command that runs the process, `hear` is told of everything it says at once."""
        assert recipe.run is not None
        spec = Spec(recipe=recipe.model_dump(mode="json"), run=recipe.run, facts=facts, epoch=1, member=name)
        self._channel, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [*within, sys.executable, "-c", _PROGRAM, str(theirs.fileno()), spec.model_dump_json()],
            pass_fds=[theirs.fileno()],
            cwd=TESTS,
            env={**os.environ, **(env or {})},
        )
        theirs.close()
        self.name = name
        self.step = 0
        self.heard: queue.Queue[Any] = queue.Queue()
        self._hear = hear
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # One that is killed leaves in the middle of whatever was said.
        with contextlib.suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                saying = parse_saying(line)
                if self._hear is not None:
                    self._hear(self.name, saying)
                if isinstance(saying, Told):
                    self.step = saying.progress["step"]
                elif not isinstance(saying, Beat):
                    self.heard.put(saying)

    def order(self, message: Any) -> None:
        send(self._channel, message)

    def hear(self, kind: type[S]) -> S:
        """The next saying of this kind; others are passed over, but for a failure that wasn't asked for."""
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            saying = self.heard.get(timeout=max(0.0, give_up_s - time.monotonic()))
            if isinstance(saying, kind):
                return saying
            assert not isinstance(saying, Failed), saying

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(how)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._channel.close()


class Company:
    """Members by name, formed into one generation after another."""

    def __init__(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        self._recipe = recipe
        self._facts = facts
        self._generation = 0
        self.members: dict[str, MemberProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members.values():
            member.close()

    def hire(self, *names: str) -> None:
        for name in names:
            self.members[name] = MemberProcess(self._recipe, self._facts, name)

    def form(self, *names: str) -> int:
        """Order these members into the next generation, in order of rank; gives its number."""
        self._generation += 1
        host, *others = [self.members[name] for name in names]

        def join(rank: int, port: int | None) -> Join:
            return Join(
                generation=self._generation,
                attempt=f"a-g{self._generation}",
                rank=rank,
                world=len(names),
                host="127.0.0.1",
                port=port,
            )

        host.order(join(0, None))
        if others:
            port = host.hear(Hosting).port
            for rank, other in enumerate(others, 1):
                other.order(join(rank, port))
        return self._generation

    def dismiss(self, name: str) -> int:
        member = self.members.pop(name)
        member.order(Leave())
        code = member.process.wait(PATIENCE_S)
        member.close()
        return code


def wait_until(true: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up_s, "waited too long"
        time.sleep(0.01)
