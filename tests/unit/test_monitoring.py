"""The dashboard and the alert rules name only metrics that exist, and commands that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from serving.exposition import merge
from serving.metric_table import METRICS, sample_names
from tests.prometheus import MONITORING, agent_page, dashboard, expressions, rules

_NAME = re.compile(r"\b(?:tandem|ray_serve)_[a-z0-9_]+")
_COMMAND = re.compile(r"`tandem ([a-z0-9]+)(?: ([a-z]+))?")


def test_whatever_is_asked_for_exists() -> None:
    asked = {name for expr in expressions() for name in _NAME.findall(expr)}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert len(asked) > 20
    assert asked - sample_names() == set()
    used = {name for expr in expressions() for name in re.findall(r"tandem:[a-z0-9_:]+", expr)}
    assert used <= recorded


def test_labels_that_are_asked_for_exist() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    known = labels | {"model", "le", "run", "application", "deployment"}
    for expr in expressions():
        grouped = re.findall(r"\bby \(([^)]*)\)", expr)
        named = {label.strip() for group in grouped for label in group.split(",")}
        named |= set(re.findall(r"[{,](\w+)[=!]~?\"|[{,](\w+)=\"", expr)[0]) if "{" in expr else set()
        assert named - {""} <= known, expr


def test_every_alert_says_what_to_do_with_commands_that_exist() -> None:
    from cluster.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 8
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]
        found = _COMMAND.findall(alert["annotations"]["runbook"])
        assert found, alert["alert"]
        for name, below in found:
            assert name in commands, (alert["alert"], name)
            group = getattr(commands[name], "commands", None)
            assert group is None or below in group, (alert["alert"], name, below)


def test_the_dashboard_is_what_grafana_expects() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert (MONITORING / "dashboards" / "serving.json").stat().st_size < 1_000_000
    assert {"uid", "title", "panels", "templating", "time"} <= set(board)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_page_is_sound_and_its_histograms_are_whole() -> None:
    families = {family.name: family for family in text_string_to_metric_families(merge([agent_page()]))}
    seconds = families["tandem_request_seconds"]
    assert seconds.type == "histogram"
    buckets = [s for s in seconds.samples if s.name.endswith("_bucket")]
    assert [s.value for s in buckets] == [0.0] * 5 + [3.0] * 10  # 25 ms is in the bucket up to 25 ms
    assert buckets[-1].labels["le"] == "+Inf"
    assert sum(s.value for s in seconds.samples if s.name.endswith("_sum")) == pytest.approx(0.075)
    phases = {
        s.labels["phase"]: s.value
        for s in families["tandem_phase_seconds"].samples
        if s.name.endswith("_sum")
    }
    assert phases["run"] == pytest.approx(0.06)
    shed = {s.labels["reason"]: s.value for s in families["tandem_shed"].samples}
    assert shed == {"expired": 1.0, "deadline": 1.0}
    assert {s.name for family in families.values() for s in family.samples} <= sample_names()


def test_two_nodes_make_one_page() -> None:
    page = merge([agent_page(), agent_page("other")])
    assert page.count("# TYPE tandem_request_seconds histogram") == 1
    assert page.count('tandem_request_seconds_bucket{WorkerId="w",model="other"') == 15


TOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(TOOL is None, reason="promtool isn't installed (apt: prometheus)")


@needs_promtool
def test_promtool_finds_nothing_to_say_of_the_page() -> None:
    done = subprocess.run(
        [str(TOOL), "check", "metrics"],
        input=merge([agent_page()]),
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    # Ray's own labels, such as WorkerId, are what they are.
    assert [line for line in done.stderr.splitlines() if "camelCase" not in line] == []


@needs_promtool
def test_the_rules_fire_on_made_up_series(tmp_path: Path) -> None:
    alerts = MONITORING / "alerts.yaml"

    def case(alert: str, at: str, labels: dict[str, str] | None, *series: tuple[str, str]) -> dict[str, Any]:
        """`labels` None: the alert must be quiet."""
        expected = [] if labels is None else [{"exp_labels": labels}]
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series],
            "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
        }

    m, page, ticket = {"model": "m"}, {"severity": "page"}, {"severity": "ticket"}
    good = 'tandem_requests_total{model="m",route="infer",status="200"}'
    bad = 'tandem_requests_total{model="m",route="infer",status="500"}'
    ended = 'tandem_trials_ended_total{model="m",version="4",outcome="abandoned"}'
    shed = 'tandem_shed_total{model="m",reason="queue_full"}'
    wanted = 'ray_serve_autoscaling_target_replicas{application="a",deployment="model"}'
    healthy = 'ray_serve_deployment_replica_healthy{application="a",deployment="model",replica="r"}'
    app = {"application": "a", "deployment": "model"}
    step, workers = 'tandem_training_step{run="r"}', 'tandem_training_workers{run="r"}'
    cases = [
        case("TandemErrorsBurnFast", "65m", m | page, (good, "0+100x70"), (bad, "0+10x70")),
        case("TandemErrorsBurnFast", "65m", None, (good, "0+10000x70"), (bad, "0+10x70")),
        case("TandemErrorsBurnSlowly", "7h", m | ticket, (good, "0+100x420"), (bad, "0+1x420")),
        case("TandemQueueOld", "5m", m | page, ('tandem_queue_age_seconds{model="m"}', "2x10")),
        case("TandemQueueOld", "5m", None, ('tandem_queue_age_seconds{model="m"}', "0.2x10")),
        case("TandemSheds", "20m", m | page, (good, "0+100x30"), (shed, "0+20x30")),
        case("TandemReplicasMissing", "15m", app | page, (wanted, "2x20"), (healthy, "1x20")),
        case("TandemReplicasMissing", "15m", app | page, (wanted, "2x20")),
        case("TandemReplicasMissing", "15m", None, (wanted, "1x20"), (healthy, "1x20")),
        case("TandemReplicaUnhealthy", "10m", app | page, (healthy, "0x20")),
        case(
            "TandemLoadFailures", "20m", m | ticket, ('tandem_load_failures_total{model="m"}', "_x15 1+0x10")
        ),
        case("TandemCanaryAbandoned", "20m", m | {"version": "4"} | ticket, (ended, "_x15 1+0x10")),
        case("TandemCanaryAbandoned", "60m", None, (ended, "_x15 1+0x60")),
        case("TandemTrainingStalled", "30m", {"run": "r"} | ticket, (step, "5x40"), (workers, "2x40")),
        case("TandemTrainingStalled", "30m", None, (step, "0+5x40"), (workers, "2x40")),
    ]
    # Annotations are compared too unless they are given as they are; so the rules are tested without them.
    bare = yaml.safe_load(alerts.read_text())
    for group in bare["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(bare))
    tests = tmp_path / "tests.yaml"
    tests.write_text(json.dumps({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": cases}))
    for command in (["check", "rules", str(alerts)], ["test", "rules", str(tests)]):
        done = subprocess.run([str(TOOL), *command], check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
