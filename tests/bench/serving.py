"""`make bench-serving`: requests a second on the zero-cost model, Tandem beside other servers; and images, in
binary beside JSON.

One server of each pair runs while it is measured; the other is paused (SIGSTOP), since the daemons
of an idle Ray take up to a tenth of two cores. Both share two cores with wrk. Each pair measures
both of Tandem's routes and the peer's one, at each number of connections.

    python -m tests.bench.serving [--only peers|binary] [--peers litserve,mosec] [--pairs 5] [--seconds 2]
        [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.bench import image_tensors, tandem_server
from tests.bench.environments import NotInstalled
from tests.bench.load import INSTALL, drive, find_wrk
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import PAIRS, Comparison, Report, in_turn
from tests.bench.peers import PEERS, Peer, Route, peer_variables
from tests.bench.processes import NotStarted, Server, free_port, running
from tests.bench.zero_cost import ZeroCost, zero_cost

CORES = 2
CONNECTIONS = (32, 128)
READY_WITHIN_S = 120
WARM_UP_S = 2
ANSWER_WITHIN_S = 10


class WrongAnswer(Exception):
    """A server that answers something else than the model does."""


@dataclass
class Target:
    """A server and the routes it is measured on."""

    server: Server
    base: str
    bodies: Mapping[Route, Path]
    failed: int = 0
    """Requests refused or broken while it was measured; they don't count as answered."""

    def measure(self, seconds: int) -> dict[tuple[str, int], float]:
        """Good answers a second by route and number of connections."""
        self.server.resume()
        try:
            return {
                (route.path, connections): self._drive(route, connections, seconds)
                for route in self.bodies
                for connections in CONNECTIONS
            }
        finally:
            self.server.pause()

    def warm_up(self) -> None:
        """Some seconds of load, uncounted; then paused."""
        for route, body in self.bodies.items():
            drive(self.base + route.path, body, connections=max(CONNECTIONS), seconds=WARM_UP_S)
        self.server.pause()

    def _drive(self, route: Route, connections: int, seconds: int) -> float:
        # A moment of load first: caches, and a server that has just been let go on.
        drive(self.base + route.path, self.bodies[route], connections=connections, seconds=1)
        load = drive(self.base + route.path, self.bodies[route], connections=connections, seconds=seconds)
        self.failed += load.refused + load.broken
        return load.requests_per_s


@contextlib.contextmanager
def target(
    command: list[str], variables: Mapping[str, str], port: int, routes: Sequence[Route], model: ZeroCost
) -> Iterator[Target]:
    """A started server that gives the right answer on every route.

    Raises:
        NotStarted: it doesn't start.
        WrongAnswer: it answers, but not right.
    """
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        bodies = {}
        for number, route in enumerate(routes):
            bodies[route] = Path(folder, f"{number}.json")
            bodies[route].write_text(json.dumps(route.body(model.row_F)))

        def ready() -> bool:
            return all(_answers(base + route.path, body) for route, body in bodies.items())

        with running(command, env=variables, ready=ready, within_s=READY_WITHIN_S) as server:
            for route, body in bodies.items():
                answer = _post(base + route.path, body)
                if not model.right(route.scores(json.loads(answer))):
                    raise WrongAnswer(f"{route.path} gave {answer[:200]!r}")
            yield Target(server, base, bodies)


def _answers(url: str, body: Path) -> bool:
    try:
        _post(url, body)
    except (OSError, urllib.error.URLError):
        return False
    return True


def _post(url: str, body: Path) -> bytes:
    request = urllib.request.Request(url, body.read_bytes(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
        data: bytes = response.read()
        return data


def compare(peer: Peer, ours: Target, theirs: Target, pairs: int, seconds: int) -> list[Comparison]:
    """Every route of ours beside the peer's one, at each number of connections."""
    found = in_turn(lambda: ours.measure(seconds), lambda: theirs.measure(seconds), pairs)
    return [
        Comparison(
            figure=f"requests/s, {connections} connections",
            ours=route.path.rsplit("/", 1)[-1].removeprefix(tandem_server.MODEL),
            peer=peer.name,
            values=tuple((a[route.path, connections], b[peer.route.path, connections]) for a, b in found),
            aim=peer.aim,
        )
        for connections in CONNECTIONS
        for route in ours.bodies
    ]


def bench(peers: Sequence[Peer], pairs: int, seconds: int, report: Report, console: Console) -> None:
    """Compare with each peer; one that can't be installed or started becomes a note."""
    model = zero_cost()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
        graph = folder / "mlp.onnx"
        graph.write_bytes(model.graph)
        tandem_server.write_store(folder / "store", model.graph)
        port = free_port()
        console.print("starting Tandem")
        ours = stack.enter_context(
            target(
                tandem_server.command(folder / "store", port),
                tandem_server.variables(folder / "state"),
                port,
                (tandem_server.INFER, tandem_server.PREDICT),
                model,
            )
        )
        ours.warm_up()
        for peer in peers:
            console.print(f"{peer.name}: installing, starting, {pairs} pairs")
            try:
                command = peer.command(peer.bin(), port := free_port())
                with target(command, peer_variables(graph), port, (peer.route,), model) as theirs:
                    theirs.warm_up()
                    report.comparisons += compare(peer, ours, theirs, pairs, seconds)
            except (NotInstalled, NotStarted, WrongAnswer, subprocess.SubprocessError) as error:
                report.notes.append(f"{peer.name} is missing: {error}")
            else:
                report.notes.append(f"{peer.name}: {peer.set_up}; {theirs.failed} requests failed")
        report.notes.append(f"Tandem: tandem serve as it comes; {ours.failed} requests failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("peers", "binary"), help="one part of it")
    parser.add_argument("--peers", default=",".join(PEERS), help=", ".join(PEERS))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    chosen = parser.parse_args()
    console = Console(width=160)
    if find_wrk() is None:
        console.print(INSTALL)
        return 1
    names = chosen.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    use_cores(CORES)
    report = Report(
        "Serving, zero-cost model (64 numbers as JSON, MLP 64-128-10) and images, closed loop by wrk -t1",
        machine_facts(),
        {
            "ours": distributions("tandem-ray", "ray", "onnxruntime"),
            "peers": ", ".join(sorted({r for name in names for r in PEERS[name].requirements})),
        },
    )
    if chosen.only != "binary":
        bench([PEERS[name] for name in names], chosen.pairs, chosen.seconds, report, console)
    if chosen.only != "peers":
        report.comparisons.append(image_tensors.compare(chosen.pairs, chosen.seconds))
    report.show(console)
    if chosen.out:
        report.write(chosen.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
