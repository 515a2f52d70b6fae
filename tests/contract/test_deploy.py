"""Every flag, port, path and name in deploy/ exists in the programs and the cluster files."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import stitch.cli.main
from router_gateway.config import GatewaySettings, check
from stitch.cli.certs import CertificateSet
from stitch.cluster import ClusterConfig, GatewayConfig, ShardConfig, load_cluster
from stitch.tls import GATEWAY
from stitch_server.config import shard_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAMS = {"stitch-server": "stitch_server.cli", "router-gateway": "router_gateway.cli"}
DRAIN_SECONDS = GatewaySettings.model_fields["drain_seconds"].default
PROCESSES = ("bottom", "top", "gateway")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TLS_FILES = ("tls/{name}/authority.pem", "tls/{name}/certificate.pem", "tls/{name}/key.pem")
BUILT = [name for name, service in SERVICES.items() if "build" in service]
PROGRAM_CONTAINERS = [name for name in BUILT if name != "certs"]


@pytest.fixture(scope="module")
def cluster() -> ClusterConfig:
    return load_cluster(str(DEPLOY / "compose.toml"))


@pytest.mark.parametrize("name", PROGRAM_CONTAINERS)
def test_commands_parse(name: str) -> None:
    assert _parsed(name).cluster if name in PROCESSES else _parsed(name).source


@pytest.mark.parametrize("name", PROCESSES)
def test_process_listens_on_the_address_of_the_cluster_file(name: str, cluster: ClusterConfig) -> None:
    parsed = _parsed(name)
    config = cluster.gateway if name == "gateway" else cluster.shard(parsed.shard)
    host, _, port = config.address.rpartition(":")
    assert host == name
    assert parsed.listen == f"0.0.0.0:{port}"
    if name == "gateway":
        assert (cluster.gateway.http, parsed.http) == ("gateway:8000", "0.0.0.0:8000")
    assert not parsed.insecure
    assert (ROOT / parsed.cluster).samefile(DEPLOY / "compose.toml")


def test_every_shard_of_the_cluster_has_a_service(cluster: ClusterConfig) -> None:
    assert {_parsed(name).shard for name in PROCESSES if name != "gateway"} == {one.name for one in cluster.shards}


@pytest.mark.parametrize("name", PROCESSES)
def test_health_check_asks_the_process_of_its_container(name: str) -> None:
    *program, file, process = SERVICES[name]["healthcheck"]["test"]
    assert program == ["CMD", "python", "-m", "stitch.health"]
    assert (ROOT / file).samefile(DEPLOY / "compose.toml")
    assert process == getattr(_parsed(name), "shard", GATEWAY)


def test_nothing_allows_unencrypted_connections() -> None:
    texts = [path.read_text() for path in (*DEPLOY.rglob("*"), ROOT / "README.md") if path.is_file()]
    assert not any("--insecure" in text for text in texts)
    clusters = [load_cluster(str(path)) for path in DEPLOY.glob("*.toml")]
    assert len(clusters) > 1
    assert all(cluster.tls is not None for cluster in clusters)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.toml")), ids=lambda path: path.name)
def test_programs_may_listen_to_other_machines(file: Path) -> None:
    cluster = load_cluster(str(file))
    check(GatewaySettings(cluster=cluster, listen="0.0.0.0:7000", http="0.0.0.0:8000"))
    for shard in cluster.shards:
        assert shard_settings(cluster, shard.name, "0.0.0.0:7100", None, False, False, 30.0).listen


def test_each_container_sees_its_own_key_alone(cluster: ClusterConfig) -> None:
    folders = {_mounted(name): name for name in (*PROCESSES, "prometheus")}
    assert None not in folders
    made = {volume: Path(target) for volume, target in (_split(mount) for mount in SERVICES["certs"]["volumes"])}
    for volume, name in folders.items():
        process = "prometheus" if name == "prometheus" else getattr(_parsed(name), "shard", GATEWAY)
        assert made[str(volume)] == Path("/app/deploy/tls", process)
        written = {f"/app/deploy/{file.replace('{name}', process)}" for file in TLS_FILES}
        assert {Path(file).parent for file in written} == {made[str(volume)]}


def test_certificates_of_the_containers_name_their_hosts(cluster: ClusterConfig, tmp_path: Path) -> None:
    (program, *arguments), *others = (line.split() for line in SERVICES["certs"]["command"][0].split(" && "))
    assert (program, arguments[:4]) == ("stitch", ["certs", "deploy/compose.toml", "--out", "deploy/tls"])
    parsed = stitch.cli.main.parser().parse_args(arguments)
    written = dict(CertificateSet(cluster, tmp_path, timedelta(days=1)).write(clients=parsed.client))
    assert {identity.name for identity in written} == {"bottom-0", "top-0", GATEWAY, "prometheus", "me"}
    [uid] = {one.split(":")[0] for line in others if line[0] == "chown" for one in line if ":" in one}
    for image in ("gateway", "shard"):
        assert f"useradd --system --uid {uid} " in (DEPLOY / f"images/{image}.Dockerfile").read_text()
    assert SERVICES["prometheus"]["user"].split(":")[0] == uid


def test_import_service_imports_the_models_of_the_cluster(cluster: ClusterConfig) -> None:
    assert {_parsed("import").source} == {cluster.models.bottom.pinned_source, cluster.models.top.pinned_source}


def test_stitches_of_the_cluster_exist(cluster: ClusterConfig) -> None:
    stitches = [path for route in cluster.routes if (path := cluster.stitch_file(route)) is not None]
    assert stitches
    assert all(path.is_file() for path in stitches)


def test_prometheus_scrapes_every_process(cluster: ClusterConfig) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    scraped = [target for job in config["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    configs: list[GatewayConfig | ShardConfig] = [cluster.gateway, *cluster.shards]
    assert sorted(scraped) == sorted(f"{one.address.rpartition(':')[0]}:{one.metrics_port}" for one in configs)


def test_prometheus_mounts_its_rules_and_knows_the_alertmanager() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    mounted = {Path(target).name for mount in SERVICES["prometheus"]["volumes"] for target in mount.split(":")[1:2]}
    assert set(config["rule_files"]) <= mounted
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    [manager] = config["alerting"]["alertmanagers"]
    assert {target.split(":")[0] for one in manager["static_configs"] for target in one["targets"]} <= set(SERVICES)


@pytest.mark.parametrize("name", PROCESSES)
def test_stop_grace_period_is_longer_than_draining(name: str) -> None:
    assert _seconds(SERVICES[name]["stop_grace_period"]) > DRAIN_SECONDS


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("systemd/*.service")), ids=lambda path: path.name)
def test_systemd_unit_starts_a_program_and_lets_it_drain(unit: Path) -> None:
    settings = dict(re.findall(r"^(\w+)=(.+)$", unit.read_text(), re.MULTILINE))
    program, *arguments = settings["ExecStart"].split()
    parsed = _parser(Path(program).name).parse_args(arguments)
    assert parsed.cluster == "/etc/stitch/cluster.toml"
    assert float(settings["TimeoutStopSec"]) > DRAIN_SECONDS


def test_published_ports_are_on_the_loopback_interface() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", BUILT)
def test_images_are_built_from_existing_files(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    dockerfile = (ROOT / build["dockerfile"]).read_text()
    assert set(build.get("args", {})) <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    for copied in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all(list(ROOT.glob(path)) for path in copied.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[([\w,]+)\]", dockerfile)[0].split(",")) <= set(extras)


def test_mounted_files_and_volumes_exist() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), mount


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/stitch.yml").read_text())["providers"]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/stitch.json").read_text())
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert source["url"].removeprefix("http://").split(":")[0] in SERVICES
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel.get("targets", [])}
    assert used == {source["uid"]}


def test_two_servers_file_describes_two_hosts() -> None:
    cluster = load_cluster(str(DEPLOY / "two-servers.toml"))
    hosts = {shard.role: shard.address.rpartition(":")[0] for shard in cluster.shards}
    assert hosts["bottom"] != hosts["top"]
    assert {route.name: route.bottom_layers for route in cluster.routes} == {"weak": 15, "strong": 20}
    assert all(cluster.stages(route) for route in cluster.routes)
    assert cluster.gateway.metrics_port
    assert all(shard.metrics_port for shard in cluster.shards)


def _mounted(name: str) -> str | None:
    """The volume with the certificates of that service, which it can't write."""
    mounts = [mount.split(":") for mount in SERVICES[name]["volumes"]]
    found = [volume for volume, *_ in mounts if volume.startswith("tls")]
    assert all(mount[-1] == "ro" for mount in mounts if mount[0].startswith("tls"))
    return found[0] if len(found) == 1 else None


def _split(mount: str) -> tuple[str, str]:
    volume, target = mount.split(":")[:2]
    return volume, target


def _parsed(name: str) -> argparse.Namespace:
    """A service's command, parsed by the program that its image starts."""
    dockerfile = (ROOT / SERVICES[name]["build"]["dockerfile"]).read_text()
    (program,) = json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[0])
    return _parser(program).parse_args(SERVICES[name]["command"])


def _parser(program: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(PROGRAMS[program]).build_parser()
    return parser


def _seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration.removesuffix("s"))
