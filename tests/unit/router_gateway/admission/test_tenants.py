"""Tests of tenants: whose key a call carries, what the keys file may say, and how it is read again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from router_gateway.admission.tenants import (
    NO_CREDENTIALS,
    Credentials,
    Tenant,
    Tenants,
    hash_key,
    open_tenants,
    read_tenants,
)
from stitch.errors import Forbidden, InvalidRequest, Unauthenticated
from stitch.reloading import RELOAD_INTERVAL_SECONDS, ReloadingFile

ROUTES = ("weak", "strong")


def section(name: str, key: str, more: str = "") -> str:
    return f'[tenants.{name}]\nkeys = ["{hash_key(key)}"]\n{more}\n'


class TenantsOnClock:
    """The tenants of a file, on a clock that a test moves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        file = ReloadingFile("tenants", path, lambda file: read_tenants(file, ROUTES), lambda: self.now)
        self._tenants = Tenants(file)

    def name_of(self, key: str) -> str:
        return self._tenants.authenticate(Credentials(key)).name

    def replace(self, content: str) -> None:
        self.path.write_text(content)
        self.now += RELOAD_INTERVAL_SECONDS


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsOnClock:
    path = tmp_path / "keys.toml"
    path.write_text(section("blue", "b-key") + section("red", "r-key", "weight = 3"))
    return TenantsOnClock(path)


def test_key_is_found_by_its_hash(tenants: TenantsOnClock) -> None:
    assert (tenants.name_of("b-key"), tenants.name_of("r-key")) == ("blue", "red")


@pytest.mark.parametrize("credentials", [NO_CREDENTIALS, Credentials("other"), Credentials("", ["blue"])])
def test_caller_without_a_tenants_key_is_unauthenticated(tenants: TenantsOnClock, credentials: Credentials) -> None:
    with pytest.raises(Unauthenticated):
        open_tenants(tenants.path, ROUTES).authenticate(credentials)


def test_hash_of_a_key_is_no_key(tenants: TenantsOnClock) -> None:
    with pytest.raises(Unauthenticated):
        tenants.name_of(hash_key("b-key"))


def test_without_a_file_every_caller_is_the_default_tenant() -> None:
    tenants = open_tenants(None, ROUTES)
    assert tenants.authenticate(NO_CREDENTIALS) == tenants.authenticate(Credentials("any")) == Tenant(name="default")
    assert tenants.names == ["default"]


def test_certificate_name_authenticates_where_no_key_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[tenants.lab]\ncertificates = ["lab.example"]\n')
    tenants = open_tenants(path, ROUTES)
    assert tenants.authenticate(Credentials(None, ["x", "lab.example"])).name == "lab"
    with pytest.raises(Unauthenticated):
        tenants.authenticate(Credentials("wrong", ["lab.example"]))


def test_replaced_file_is_in_force_after_the_reload_interval(tenants: TenantsOnClock) -> None:
    tenants.replace(section("green", "g-key"))
    assert tenants.name_of("g-key") == "green"
    with pytest.raises(Unauthenticated):
        tenants.name_of("b-key")


def test_invalid_file_leaves_the_tenants_as_they_are(tenants: TenantsOnClock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        tenants.replace("[tenants.blue]\nkeys = ['b-key']\n")
        assert tenants.name_of("r-key") == "red"
    assert "the tenants stay as they are: tenants.blue.keys.0 is 'not shown'" in caplog.text
    assert "b-key" not in caplog.text


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("", "gateway.keys"),
        ("[tenants", "gateway.keys"),
        ("[other]\n", "gateway.keys"),
        ("[tenants]\nblue = 1\n", "tenants.blue"),
        ("[tenants.Blue]\n", "tenants.Blue.name"),
        ("[tenants.blue]\nkeys = ['secret']\n", "tenants.blue.keys.0"),
        ("[tenants.blue]\nweight = 0\n", "tenants.blue.weight"),
        ("[tenants.blue]\nmax_running = 0\n", "tenants.blue.max_running"),
        ("[tenants.blue]\nsurprise = 1\n", "tenants.blue.surprise"),
        ("[tenants.blue]\nroutes = ['other']\n", "tenants.blue.routes"),
        (section("blue", "same") + section("red", "same"), "tenants.red.keys[0]"),
    ],
)
def test_invalid_file_is_refused_by_its_field(tmp_path: Path, content: str, field: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        open_tenants(path, ROUTES)
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


def test_limit_of_max_tokens_names_the_limit() -> None:
    tenant = Tenant(name="blue", max_tokens=64)
    tenant.check_max_tokens(64)
    with pytest.raises(InvalidRequest, match=r"sampling.max_tokens is 65, but tenant blue may set at most 64"):
        tenant.check_max_tokens(65)


@pytest.mark.parametrize("route", ["strong", None])
def test_route_that_a_tenant_may_not_use_is_forbidden(route: str | None) -> None:
    tenant = Tenant(name="blue", routes=("weak",))
    tenant.check_route("weak")
    with pytest.raises(Forbidden, match="tenant blue may name weak"):
        tenant.check_route(route)


def test_key_is_in_no_representation() -> None:
    assert "secret" not in repr(Credentials("secret"))
