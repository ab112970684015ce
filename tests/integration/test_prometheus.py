"""The real Prometheus scrapes our page, takes our rules, and answers every query of the dashboard."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving.exposition import merge
from tests.prometheus import agent_page, expressions, prometheus, rules, serving_page
from tests.serving_process import wait_until

PROGRAM = shutil.which("prometheus")


@pytest.mark.skipif(PROGRAM is None, reason="prometheus isn't installed (apt: prometheus)")
def test_dashboard_and_alerts_in_the_real_prometheus(tmp_path: Path) -> None:
    page = merge([agent_page()]).encode()
    with serving_page(page) as target, prometheus(str(PROGRAM), target, tmp_path) as client:

        def value(expr: str) -> float | None:
            answer = client.get("/api/v1/query", params={"query": expr}).json()
            assert answer["status"] == "success", (expr, answer)
            found = answer["data"]["result"]
            return float(found[0]["value"][1]) if found else None

        def loaded() -> list[str]:
            groups = client.get("/api/v1/rules").json()["data"]["groups"]
            return [rule["health"] for group in groups for rule in group["rules"]]

        wait_until(lambda: value('up{job="tandem"}') == 1)
        assert value('sum(tandem_requests_total{status="200"})') == 2
        assert value("histogram_quantile(0.5, sum by (le) (tandem_request_seconds_bucket))") == pytest.approx(
            0.0175
        )
        for expr in expressions():
            value(expr)
        wait_until(lambda: set(loaded()) == {"ok"})
        assert len(loaded()) == len(rules())
