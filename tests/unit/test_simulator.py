"""The simulator: it counts right, it is the same every time, and the policy beats the others in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from cluster.errors import BadInput, NotFound, NotReady
from serving.scaling.observed import Seen
from serving.simulator.baselines import Knative, ServeDefault
from serving.simulator.calibrate import Totals, fit, read_totals
from serving.simulator.compare import compare
from serving.simulator.measure import Probe, measure
from serving.simulator.mixed import compare_kinds
from serving.simulator.replicas import Kind
from serving.simulator.traces import SYNTHETIC, Times, bursts, diurnal, read_trace, scaled
from serving.simulator.world import Result, Setting, World

KIND = Kind(0.1, 0.01, 16, cold_start_s=10.0)
SHARED = Path(__file__).parents[3] / "shared" / "traces"


class Always:
    """So many replicas, whatever comes."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> list[int]:
        return [self._replicas]


def replay(times_s: Times, replicas: int, kind: Kind = KIND, least: int | None = None) -> Result:
    low = replicas if least is None else least
    return World(Setting((kind,), ((low, max(replicas, 1)),), 1.0), Always(replicas)).replay(times_s)


def test_one_request_takes_one_batch() -> None:
    result = replay(np.array([5.0]), 1)
    assert (result.requests, result.violations) == (1, 0)
    assert result.latency_s[0] == pytest.approx(KIND.batch_s(1), abs=0.01)
    assert sum(result.replica_s) == pytest.approx(65.0, abs=0.1)


def test_nobody_is_lost_below_capacity_and_the_rest_is_above_it() -> None:
    capacity_s = KIND.capacity_s(1.0)
    fits = replay(np.arange(0, 60, 1 / (0.9 * capacity_s)), 1)
    assert fits.violations == 0
    twice = replay(np.arange(0, 60, 1 / (2 * capacity_s)), 1)
    assert twice.violation_share == pytest.approx(0.5, abs=0.05), "the half that can be answered is"


def test_a_cold_start_makes_the_first_wait() -> None:
    sudden = Kind(0.1, 0.01, 16, cold_start_s=3.0, spread=0.0)
    result = replay(np.array([0.5]), 1, sudden, least=0)
    assert result.violations == 1
    assert 3.0 < result.latency_s[0] < 5.0


def test_more_slots_do_more() -> None:
    times_s = np.arange(0, 30, 1 / 100)
    assert replay(times_s, 1, Kind(0.1, 0.01, 16, slots=2)).violations < replay(times_s, 1).violations


def test_the_same_seed_gives_the_same_result() -> None:
    setting = Setting((KIND,), ((1, 100),), 1.0, seed=3)
    times_s = bursts(30.0, 300.0, 5)
    first, again = (compare(setting, times_s).results for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", sorted(SYNTHETIC))
def test_made_up_traces_are_ordered_and_seeded(name: str) -> None:
    times_s = SYNTHETIC[name](20.0, 600.0, 1)
    assert np.all(np.diff(times_s) >= 0)
    assert np.array_equal(times_s, SYNTHETIC[name](20.0, 600.0, 1))
    assert not np.array_equal(times_s, SYNTHETIC[name](20.0, 600.0, 2))


def test_scaling_a_trace_keeps_its_span() -> None:
    times_s = diurnal(10.0, 300.0, 0)
    more = scaled(times_s, 2.5, 0)
    assert more.size == pytest.approx(2.5 * times_s.size, rel=0.05)
    assert more[-1] <= times_s[-1] + 1.0


def test_serve_waits_and_knative_panics() -> None:
    calm = Seen(ready=1, in_flight=1.0)
    burst = Seen(ready=1, in_flight=40.0)
    serve, knative = ServeDefault(), Knative(16.0)
    for second in range(60):
        assert serve([calm], [1], float(second)) == [1]
        knative([calm], [1], float(second))
    wanted = [(serve([burst], [1], s)[0], knative([burst], [1], s)[0]) for s in map(float, range(60, 130))]
    assert next(i for i, (n, _) in enumerate(wanted) if n > 1) >= 30
    assert next(i for i, (_, n) in enumerate(wanted) if n > 1) <= 6


@pytest.mark.parametrize("made", ["diurnal", "waves"])
def test_fewer_violations_for_fewer_replica_seconds(made: str) -> None:
    times_s = diurnal(300.0, 1200.0, 7) if made == "diurnal" else _waves(300.0, 1200.0)
    compared = compare(Setting((KIND,), ((1, 200),), 1.0), times_s)
    for other in ("serve", "knative"):
        violations, replica_s = compared.ratios("ours", other)
        assert np.isnan(violations) or violations <= 0.5
        assert replica_s <= 1.05


def _waves(rate: float, duration_s: float) -> Times:
    """A load that grows for two minutes, then swings by half within three."""
    draw = np.random.default_rng(11)
    grid_s = np.arange(0.0, duration_s, 0.1)
    grown = np.minimum(1.0, (grid_s + 5.0) / 120.0)
    counts = draw.poisson(0.1 * rate * grown * (1 + 0.5 * np.sin(grid_s / 60)))
    return np.sort(np.repeat(grid_s, counts) + draw.uniform(0, 0.1, int(counts.sum())))


@pytest.mark.parametrize("file", ["azure_llm_2023_conv.csv", "mooncake_conversation.jsonl"])
def test_on_the_traces_of_others(file: str) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"no {file} in ../shared/traces")
    times_s = scaled(read_trace(SHARED / file), 20)
    compared = compare(Setting((KIND,), ((1, 1000),), 1.0), times_s)
    assert compared.ratios("ours", "knative") <= (0.5, 1.0)
    violations, replica_s = compared.ratios("ours", "serve")
    assert violations < 1.0
    assert replica_s <= 0.5


def test_traces_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.6805900,374\n2023-11-16 18:15:50.9951690,396\n"
    )
    (tmp_path / "b.csv").write_text("seconds\n3.5\n1.5\n")
    (tmp_path / "c.jsonl").write_text('{"timestamp": 1000, "x": 1}\n\n{"timestamp": 2500}\n')
    assert read_trace(tmp_path / "a.csv") == pytest.approx([0.0, 4.314579])
    assert read_trace(tmp_path / "b.csv") == pytest.approx([0.0, 2.0])
    assert read_trace(tmp_path / "c.jsonl") == pytest.approx([0.0, 1.5])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.csv", ""),
        ("header.csv", "seconds\n"),
        ("words.csv", "seconds\n1.0\nsoon\n"),
        ("columns.csv", "when\n1\n"),
        ("nan.csv", "seconds\nnan\n"),
        ("torn.jsonl", '{"timestamp": 1}\n{"timest'),
        ("other.jsonl", "[1, 2]\n"),
    ],
)
def test_what_is_no_trace_is_refused_in_four_parts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as refused:
        read_trace(tmp_path / name)
    assert set(refused.value.parts()) == {"failed", "got", "allowed", "fix"}


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_trace(tmp_path / "none.csv")


def test_a_latency_is_fitted_from_counters() -> None:
    pages = [Totals(0, 0, 0)]
    for rows in (1, 4, 16):
        before = pages[-1]
        pages.append(
            Totals(before.batches + 10, before.rows + 10 * rows, before.batch_s + 10 * KIND.batch_s(rows))
        )
    pairs = list(pairwise(pages))
    assert fit(pairs) == pytest.approx((0.1, 0.01))
    assert fit(pairs[:1]) == pytest.approx((KIND.batch_s(1), 0.0))
    with pytest.raises(NotReady):
        fit([(pages[0], pages[0])])


def test_counters_are_read_from_a_page() -> None:
    page = (
        '# TYPE tandem_batches_total counter\ntandem_batches_total{model="a"} 3\n'
        'tandem_rows_total{model="a"} 12\ntandem_batch_seconds_sum{model="a"} 0.5\n'
        'tandem_batches_total{model="b"} 4\n'
    )
    assert read_totals(page, "a") == Totals(3, 12, 0.5)
    assert read_totals(page).batches == 7


def test_two_kinds_do_no_worse_than_the_better_one_by_much() -> None:
    gpu = Kind(0.015, 0.001, 64, cold_start_s=40.0, cost_per_hour=12.0)
    setting = Setting((KIND, gpu), ((1, 100), (0, 10)), 1.0)
    found = compare_kinds(setting, ("cpu", "gpu"), diurnal(200.0, 900.0, 3))
    cheapest = min(found["cpu alone"].cost, found["gpu alone"].cost)
    assert found["cpu + gpu"].cost <= 1.2 * cheapest
    assert found["cpu + gpu"].violation_share <= 0.001
    assert len(found["cpu + gpu"].replica_s) == 2


def test_the_command_compares_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["--kind", "cpu:base=0.1,row=0.01,min=1", "--kind", "gpu:base=0.01,row=0.001,cost=9,cold=30"]
    assert main(["simulate", "bursts", "--duration-s", "120", "--json", *kinds]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["policy"] for line in lines] == ["cpu alone", "gpu alone", "cpu + gpu"]
    assert [len(line["replica_s_by_kind"]) for line in lines] == [1, 1, 2]
    assert main(["simulate", "diurnal", "--duration-s", "60", *kinds]) == 0
    assert "cpu + gpu: replicas" in capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "bursts", "--duration-s", "120", "--json", "--policy", "ours,knative"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["policy"] for line in lines] == ["ours", "knative"]
    assert main(["simulate", "diurnal", "--duration-s", "60"]) == 0
    assert "replicas" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--latency", "fast"],
        ["--latency", "2,0"],
        ["--policy", "magic"],
        ["--min", "5", "--max", "2"],
        ["--calibrate", "nowhere"],
        ["--kind", "cpu:base=0.1,row=0.01"],
        ["--kind", "cpu:base=0.1,row=0.01", "--kind", "cpu:base=0.1,row=0.01"],
        ["--kind", "cpu:base=0.1", "--kind", "gpu:base=0.1,row=0.01"],
        ["--kind", "cpu:base=2,row=0.01", "--kind", "gpu:base=0.1,row=0.01"],
    ],
)
def test_the_command_refuses(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "diurnal", "--duration-s", "20", *options]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_probe_asks_for_blank_rows_of_the_models_shapes() -> None:
    inputs = (
        {"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]},
        {"name": "t", "datatype": "BYTES", "shape": [-1, -1]},
    )
    found = json.loads(Probe("127.0.0.1", 1, "m", inputs).body(4))["inputs"]
    assert [(one["shape"], len(one["data"])) for one in found] == [([4, 2, 3], 24), ([4, 1], 4)]
    assert found[1]["data"][0] == ""


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1", "http://127.0.0.1:9"])
def test_what_is_no_service_cannot_be_measured(url: str) -> None:
    with pytest.raises(BadInput, match="no service there"):
        measure(url, None, max_batch=4)
