"""Every metric and label that the dashboard, the rules and `docs/metrics.md` name is served by a running cluster."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from router_gateway.routing.drift import DRIFT_LIMIT
from stitch.cluster import load_cluster
from tests.support.certificates import write_certificates
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/stitch.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
RULES = [
    rule
    for file in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((ROOT / "deploy/prometheus" / file).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
# Labels that the processes do not set: a histogram's bound, and those that Prometheus adds to every scrape.
FOREIGN_LABELS = {"le", "instance", "job"}
Labels = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labels]:
    """Sample name to label to its values, over all processes of a cluster that has answered on both routes."""
    file = write_tiny_cluster(tmp_path_factory.mktemp("metrics-pair"))
    files = write_certificates(load_cluster(str(file)), tmp_path_factory.mktemp("metrics-certificates"))
    fields = json.loads(file.read_text()) | {"tls": files}
    fields["gateway"]["http"] = "127.0.0.1:0"
    file.write_text(json.dumps(fields))
    with running_cluster(file, tmp_path_factory.mktemp("metrics-run")) as cluster:
        for route in ("weak", "strong", "auto"):
            cluster.generate("stitch", route=route, max_tokens=4, ignore_eos=True)
        yield _scraped(cluster)


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *(rule["expr"] for rule in RULES)])
def test_panels_and_rules_query_served_metrics(expression: str, served: Labels) -> None:
    queried = re.findall(r"(stitch_\w+)(?:\{([^}]*)\})?", expression)
    for name, matchers in queried:
        assert name in served
        assert set(re.findall(r"(\w+)=~", matchers)) - FOREIGN_LABELS <= set(served[name])
        for label, value in re.findall(r'(\w+)="([^"]*)"', matchers):
            assert value in served[name][label]
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert grouped - FOREIGN_LABELS <= {label for name, _ in queried for label in served[name]}


def test_legends_use_labels_of_their_query() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            assert shown <= kept or (not kept and shown in ({"shard"}, {"route"})), panel["title"]


def test_documented_metrics_are_served(served: Labels) -> None:
    named = _documented()
    assert len(named) > 15
    for name, labels in named:
        samples = [sample for sample in (name, f"{name}_count") if sample in served]
        assert samples, name
        assert set(labels.split(",")) - {""} <= set(served[samples[0]]), name


def test_dashboard_shows_all_documented_metrics() -> None:
    queried = {
        re.sub("_(bucket|sum|count)$", "", name) for one in EXPRESSIONS for name in re.findall(r"stitch_\w+", one)
    }
    assert {name for name, _ in _documented()} == queried


def test_alerts_and_panels_read_recorded_ratios() -> None:
    read = {
        name for one in (*EXPRESSIONS, *(rule["expr"] for rule in ALERTS)) for name in re.findall(r"stitch:[\w:]+", one)
    }
    assert read == RECORDED


def test_every_alert_has_a_section_in_the_runbook() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = re.findall(
        r"^## (\w+)\n- \*\*Means\*\*: .*?\((\w+)\).*?^- \*\*Look at\*\*: .*?^- \*\*Do\*\*: ", runbook, re.M | re.S
    )
    assert sections == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]
    for rule in ALERTS:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    panels = {panel["title"] for panel in DASHBOARD["panels"]}
    assert set(re.findall(r"\"([\w ]+)\"", runbook)) <= panels


def test_drift_alert_uses_the_limit_of_the_gateway() -> None:
    [expression] = [rule["expr"] for rule in ALERTS if rule["alert"] == "RouterDrift"]
    assert expression == f"stitch_route_drift > {DRIFT_LIMIT}"


def test_dashboard_has_no_duplicate_query() -> None:
    assert len(set(EXPRESSIONS)) == len(EXPRESSIONS)


def _documented() -> list[tuple[str, str]]:
    """The metrics and their labels in the table of `docs/metrics.md`."""
    table = (ROOT / "docs/metrics.md").read_text()
    return re.findall(r"`(stitch_\w+)(?:\{([\w,]+)\})?`", table)


def _scraped(cluster: Cluster) -> Labels:
    found: Labels = defaultdict(lambda: defaultdict(set))
    for process in cluster.names:
        for sample in cluster.metrics(process):
            name, _, labels = sample.partition("{")
            values = found[name]
            for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
                values[label].add(value)
    return found
