"""A training process that trains nothing: it speaks as members do, and steps together with its peers.

Its collective is real: rank 0 keeps a TCP connection to each of the others, and a step is done when all
have met there. What it would have learned is the number of its steps, taken from the most advanced peer at
each join. The recipe's `options` give `steps`, `step_s`, and `log_dir`, where each step leaves a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from pathlib import Path

from training.crew.messages import (
    Beat,
    Ended,
    Failed,
    Hosting,
    Join,
    Joined,
    Leave,
    Part,
    Parted,
    Pause,
    Paused,
    Ready,
    Spec,
    Told,
    error_fields,
    parse_order,
    send,
)


class Member:
    def __init__(self, channel: socket.socket, spec: Spec) -> None:
        self.channel = channel
        self.options = spec.recipe["options"]
        self.log = Path(self.options["log_dir"]) / f"{os.getpid()}.jsonl"
        self.lock = threading.Lock()
        self.joins: queue.Queue[Join | Leave] = queue.Queue()
        self.step, self.progress, self.generation = 0, 0, 0
        self.waiting, self.phase, self.warm = False, "waiting", False
        self.pause: Pause | None = None
        self.peers: list[socket.socket] = []

    def say(self, saying) -> None:
        with self.lock, contextlib.suppress(OSError):
            send(self.channel, saying)

    def listen(self) -> None:
        with self.channel.makefile("rb") as lines:
            for line in lines:
                order = parse_order(line)
                if isinstance(order, Join | Leave):
                    self.joins.put(order)
                    if isinstance(order, Leave):
                        self.drop_peers()
                elif isinstance(order, Pause) and order.generation == self.generation:
                    self.pause = order
                elif isinstance(order, Part) and order.generation == self.generation:
                    self.drop_peers()
        os._exit(0)

    def beat(self) -> None:
        while True:
            self.say(
                Beat(
                    generation=self.generation,
                    step=self.step,
                    progress=self.progress,
                    waiting=self.waiting,
                    phase=self.phase,
                )
            )
            time.sleep(0.5)

    def drop_peers(self) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def live(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        threading.Thread(target=self.beat, daemon=True).start()
        self.say(Ready(pid=os.getpid()))
        while isinstance(order := self.joins.get(), Join):
            self.generation, self.pause, self.peers = order.generation, None, []
            try:
                self.train(order)
            except (OSError, ValueError, EOFError) as error:
                self.drop_peers()
                self.phase = "parted"
                self.say(Parted(generation=order.generation, step=self.step, why=repr(error)))

    def train(self, join: Join) -> None:
        self.phase = "joining"
        self.meet(join)
        said = self.exchange(join, {"step": self.step, "warm": self.warm})
        warm = [one["step"] for one in said if one["warm"]]
        self.step = max(warm, default=0)
        self.warm = True
        self.say(Joined(generation=join.generation, step=self.step, source="memory" if warm else "fresh"))
        self.phase = "training"
        while self.step < self.options["steps"]:
            if self.options.get("fails_at") == self.step:
                from cluster.errors import BadInput

                self.say(
                    Failed(
                        generation=join.generation,
                        error=error_fields(BadInput("it can't be")),
                        retryable=False,
                    )
                )
                return
            time.sleep(self.options["step_s"])
            pause = join.rank == 0 and self.pause is not None
            said = self.exchange(join, {"pause": pause})
            self.step += 1
            self.progress += 1
            with self.log.open("a") as log:
                line = {"step": self.step, "generation": join.generation, "at": time.monotonic()}
                log.write(json.dumps(line | {"rank": join.rank, "world": join.world}) + "\n")
            if join.rank == 0:
                fields = {"phase": "training", "step": self.step, "total_steps": self.options["steps"]}
                self.say(Told(generation=join.generation, progress=fields))
            if any(one["pause"] for one in said):
                self.phase = "paused"
                self.say(Paused(generation=join.generation, step=self.step, saved=False))
                return
        self.say(Ended(generation=join.generation, steps=self.step, samples_per_s=1.0))

    def meet(self, join: Join) -> None:
        if join.rank == 0:
            with socket.create_server((join.host, 0)) as server:
                self.say(Hosting(generation=join.generation, port=server.getsockname()[1]))
                server.settimeout(20)
                self.peers = [server.accept()[0] for _ in range(join.world - 1)]
        else:
            assert join.port is not None
            self.peers = [socket.create_connection((join.host, join.port), timeout=20)]
        for peer in self.peers:
            peer.settimeout(None)
        self.files = [peer.makefile("rb") for peer in self.peers]

    def exchange(self, join: Join, mine: dict) -> list[dict]:
        """All ranks' dictionaries, in any order."""
        self.waiting = True
        if join.rank == 0:
            said = [mine, *(json.loads(self.line(file)) for file in self.files)]
            for peer in self.peers:
                peer.sendall(json.dumps(said).encode() + b"\n")
        else:
            self.peers[0].sendall(json.dumps(mine).encode() + b"\n")
            said = json.loads(self.line(self.files[0]))
        self.waiting = False
        return said

    @staticmethod
    def line(file) -> bytes:
        line = file.readline()
        if not line:
            raise EOFError("a peer is gone")
        return line


def live(channel: socket.socket, spec: Spec) -> None:
    Member(channel, spec).live()
