"""A real Prometheus scrapes a cluster of two replicas by the files of `deploy`.

Every rule and panel gets data, and a shard that is killed makes an alert, which ends when the shard is back.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import yaml

from router_gateway.routing.ttft_predictor import MIN_SAMPLES
from stitch.cluster import load_cluster
from tests.support.certificates import write_certificates
from tests.support.monitoring import DEPLOYED, Monitoring, monitored
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import BOTTOM, TOP, write_tiny_cluster
from tests.support.traces import Collector, collecting
from tests.support.waiting import becomes_true

pytestmark = pytest.mark.slow

DASHBOARD = json.loads((DEPLOYED.parent / "grafana/dashboards/stitch.json").read_text())
PANELS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
RULES = [
    rule
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((DEPLOYED / name).read_text())["groups"]
    for rule in group["rules"]
]
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "30s", "$__range": "5m", "$job": ".*", "$route": ".*", "$shard": ".*"}
DATA_SECONDS = 60.0
# Of certificates: long enough for no alert.
VALID = timedelta(days=30)
# Of a shard that starts on a machine that has other work.
BACK_SECONDS = 120.0


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Cluster]:
    file = write_tiny_cluster(
        tmp_path_factory.mktemp("pair"), name="observed", bottoms=[BOTTOM], tops=[TOP, TOP], kernels=False
    )
    files = write_certificates(load_cluster(str(file)), tmp_path_factory.mktemp("certificates"), VALID)
    fields = json.loads(file.read_text()) | {"tls": files, "traces": True}
    fields["gateway"]["http"] = "127.0.0.1:0"
    file.write_text(json.dumps(fields))
    flags = dict.fromkeys(("gateway", "bottom-0", "top-0", "top-1"), ("--log-format", "json"))
    with running_cluster(file, tmp_path_factory.mktemp("run"), flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def monitoring(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring]:
    with monitored(cluster, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


def compared(expression: str) -> list[str]:
    """The sides of an alert's comparisons."""
    return re.split(r" (?:and|>|<|==) ", expression)


def with_values(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def test_every_rule_and_every_panel_has_data(cluster: Cluster, monitoring: Monitoring) -> None:
    for number in range(MIN_SAMPLES):
        for route in ("weak", "strong"):
            prompt = "stitch " * (1 + 40 * number)
            cluster.generate(prompt, route=route, max_tokens=4, ignore_eos=True, max_ttft_seconds=60.0)
    cluster.generate("stitch", max_tokens=4)
    read = [side for rule in RULES for side in ([rule["expr"]] if "record" in rule else compared(rule["expr"]))]
    expressions = [with_values(expression) for expression in (*read, *PANELS)]

    def without_data() -> list[str]:
        return [expression for expression in expressions if not monitoring.query(expression)]

    assert becomes_true(lambda: not without_data(), DATA_SECONDS), without_data()
    rules = [rule for group in monitoring.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"] for rule in rules} == {rule.get("alert", rule.get("record")) for rule in RULES}
    fits = 'stitch_ttft_fit_seconds{route=~"weak|strong", term=~"intercept|slope"} >= 0'
    assert becomes_true(lambda: len(monitoring.query(fits)) == 4, DATA_SECONDS)


def test_request_is_found_by_its_trace_in_spans_exemplars_and_log(
    cluster: Cluster, monitoring: Monitoring, collector: Collector
) -> None:
    began = time.time()
    cluster.generate("stitch", route="weak", max_tokens=4, ignore_eos=True)

    def exemplars() -> set[str]:
        """The trace ids of the latest times to first token."""
        series = "stitch_time_to_first_token_seconds_bucket"
        found = monitoring.get("query_exemplars", query=series, start=str(began), end=str(time.time() + 1))
        return {exemplar["labels"]["trace_id"] for one in found for exemplar in one["exemplars"]}

    assert becomes_true(lambda: bool(exemplars()), DATA_SECONDS)
    lines = [json.loads(line) for line in cluster.log("gateway").splitlines() if line.startswith("{")]
    request = next(line for line in reversed(lines) if line["message"].startswith("request "))
    assert request["request_id"] in request["message"]
    assert request["trace_id"] in exemplars()

    def tree() -> dict[str, str]:
        return {
            name.rpartition("-")[0] or name: parent
            for name, trace, parent in collector.spans
            if trace == request["trace_id"]
        }

    assert becomes_true(lambda: len(tree()) == 4, DATA_SECONDS), collector.spans
    assert sorted(tree()) == ["route", "session bottom", "session top", "text_completion weak"]
    assert [name for name, parent in tree().items() if not parent] == ["text_completion weak"]


def test_killed_shard_makes_an_alert_that_ends_when_it_is_back(cluster: Cluster, monitoring: Monitoring) -> None:
    instance = cluster.metrics_address("top-1")
    cluster.kill("top-1")
    told = lambda status: monitoring.was_told("ShardDown", status, instance=instance, severity="page")  # noqa: E731
    assert becomes_true(lambda: told("firing"), DATA_SECONDS), monitoring.told
    # The other replica answers, so no route is lost.
    assert cluster.generate("stitch", max_tokens=4).generated_tokens > 0
    assert not monitoring.was_told("NoWholeRoute", "firing")
    assert not told("resolved")
    cluster.start("top-1")
    assert becomes_true(lambda: told("resolved"), BACK_SECONDS), monitoring.told
