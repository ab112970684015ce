"""The simulator, calibrated from a live measurement, beside what a live service does with the same trace.

The service is the sleeping device of `tests.bench.batching` (what it takes is known: 50 ms and 1 ms a row,
so the measurement can be judged, too), within 300 ms, from one replica to six, as in `tests.bench.scaling`. A
slice of a real trace, made fifty times as dense, is replayed live through HAProxy, and in the simulator with
what `tandem simulate --calibrate SERVICE` measured before.

    python -m tests.bench.calibration [--only measure,replay] [--seconds 60] [--at 600] [--measured FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from cluster.config import load_yaml
from serving.service import Service
from serving.simulator.compare import compare
from serving.simulator.measure import Measured, measure_service
from serving.simulator.replicas import Kind
from serving.simulator.traces import Times, read_trace, scaled
from serving.simulator.world import Setting
from tests.bench import device_runtime
from tests.bench.machine import use_cores
from tests.bench.open_loop import Planned, drive
from tests.bench.scaling import CORES, DENSER, MOST, SLO_MS, TRACE, Counting, tandem_on_device

MAX_ROWS = 32


def measured() -> Measured:
    """As the command measures."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        device_runtime.command(folder, 0, device_runtime.FIXED, SLO_MS, MAX_ROWS)
        os.environ.update(device_runtime.variables(folder, folder / "device.jsonl"))
        service = load_yaml(Service, folder / "service.yaml", [])
        return measure_service(service, service.models[0])


def slice_of(seconds: float, at_s: float) -> Times:
    """The part of the trace, from its own beginning."""
    times_s = scaled(read_trace(TRACE), DENSER)
    part: Times = times_s[(times_s >= at_s) & (times_s < at_s + seconds)] - at_s
    return part


def live(times_s: Times) -> dict[str, float]:
    """What the service does with it."""
    plan = [Planned(float(at_s), SLO_MS / 1000) for at_s in times_s]
    with tandem_on_device() as target:
        counting = Counting(target)
        counting.start()
        sent = drive(target.port, plan, target.render)
        replica_s = counting.stop()
    answered = sorted(one.latency_s for one in sent if one.status == 200)
    return {
        "violations": sum(not one.in_time for one in sent) / len(sent),
        "replica_s": replica_s,
        "p50_ms": answered[len(answered) // 2] * 1000,
        "p99_ms": answered[math.ceil(len(answered) * 0.99) - 1] * 1000,
    }


def simulated(times_s: Times, found: Measured) -> dict[str, float]:
    """What the simulator says of it. It lets a minute of quiet follow, which isn't counted here."""
    assert found.cold_start_s is not None
    kind = Kind(found.base_s, found.row_s, MAX_ROWS, cold_start_s=found.cold_start_s)
    result = compare(Setting((kind,), ((1, MOST),), SLO_MS / 1000), times_s, ("ours",)).results["ours"]
    during = [replicas for at_s, _, replicas, _ in result.points if at_s <= float(times_s[-1])]
    p50_s, p99_s = result.latency_s
    return {
        "violations": result.violation_share,
        "replica_s": float(sum(during)),
        "p50_ms": (p50_s + found.beside_s) * 1000,
        "p99_ms": (p99_s + found.beside_s) * 1000,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="measure,replay")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--at", type=float, default=600.0)
    parser.add_argument("--measured", type=Path, default=Path("measured.json"))
    asked = parser.parse_args()
    use_cores(CORES)
    if "measure" in asked.only:
        asked.measured.write_text(json.dumps(asdict(measured())))
    found = Measured(**json.loads(asked.measured.read_text()))
    print(found)  # noqa: T201
    if "replay" in asked.only:
        times_s = slice_of(asked.seconds, asked.at)
        theirs, ours = live(times_s), simulated(times_s, found)
        print(f"{times_s.size} requests in {asked.seconds:g} s")  # noqa: T201
        for name, value in theirs.items():
            print(f"{name:12} live {value:10.4g}  simulated {ours[name]:10.4g}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
