"""The rules and alerts of `deploy/prometheus`, by Prometheus's and Alertmanager's own tools."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
CASES = Path(__file__).with_name("alerts.test.yml")


def run(program: str, *arguments: str | Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; Debian has it in `prometheus` or `prometheus-alertmanager`")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then() -> None:
    run("promtool", "test", "rules", CASES)


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    expected = [
        sample["labels"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["promql_expr_test"]
        for sample in case["exp_samples"]
    ]
    for alert in (rule["alert"] for group in groups for rule in group["rules"]):
        assert any(f'alertname="{alert}"' in labels for labels in expected), alert


def test_configuration_files_are_valid() -> None:
    run("promtool", "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    run("amtool", "check-config", PROMETHEUS / "alertmanager.yml")
