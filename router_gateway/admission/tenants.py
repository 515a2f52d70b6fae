"""The tenants of a gateway: whose key or certificate a call carries, and what its tenant may do.

A key is in no file of the gateway: `keys.toml` holds SHA-256 hashes, and a call's key is found by its own hash, so the
time of the look-up depends on no key. The file is read again when it changes. Without a file there is one tenant,
`default`, and no call needs a key.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from stitch.errors import Forbidden, InvalidRequest, Unauthenticated
from stitch.reloading import ReloadingFile
from stitch.settings import Settings

KeyHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class Tenant(Settings):
    """One section of the keys file; None: no limit."""

    name: str = Field(pattern=NAME_PATTERN)
    # SHA-256 of its keys, in hexadecimal.
    keys: tuple[KeyHash, ...] = Field(default=(), strict=False)
    # Names in the certificates of its clients.
    certificates: tuple[str, ...] = Field(default=(), strict=False)
    # Its share of the shards relative to the other tenants.
    weight: float = Field(default=1.0, ge=0.01, le=100, strict=False)
    # Requests that run on shards at a time; further ones wait.
    max_running: int | None = Field(default=None, ge=1)
    # Requests that wait for shards; further ones are refused.
    max_waiting: int | None = Field(default=None, ge=0)
    # Tokens of prompts and answers.
    tokens_per_minute: int | None = Field(default=None, ge=1)
    # Tokens of one answer.
    max_tokens: int | None = Field(default=None, ge=1)
    # The routes that it may use; None: all, and the router decides.
    routes: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)

    def check_max_tokens(self, tokens: int) -> None:
        """Raises InvalidRequest for a request of longer answers than the tenant may have."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidRequest("sampling.max_tokens", tokens, f"tenant {self.name} may set at most {self.max_tokens}")

    def check_route(self, route: str | None) -> None:
        """Raises Forbidden for a route that the tenant may not use; None: the router decides."""
        if self.routes is not None and route not in self.routes:
            named = "the router's choice" if route is None else route
            raise Forbidden(f"tenant {self.name} may name {' or '.join(self.routes)}, not {named}")


DEFAULT_TENANT = Tenant(name="default")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller shows of itself; neither part is ever logged."""

    key: str | None = field(default=None, repr=False)
    # The names in the certificate that its connection has proven.
    certificate_names: Sequence[str] = ()


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True, slots=True)
class TenantTable:
    """The content of a keys file."""

    tenants: tuple[Tenant, ...]
    by_key: Mapping[str, Tenant]
    by_certificate: Mapping[str, Tenant]


class Tenants:
    """The tenants of a keys file, or `default` alone without one."""

    def __init__(self, file: ReloadingFile[TenantTable] | None = None) -> None:
        self._file = file

    @property
    def names(self) -> list[str]:
        """In the order of the file."""
        return [DEFAULT_TENANT.name] if self._file is None else [one.name for one in self._file.content.tenants]

    def authenticate(self, credentials: Credentials) -> Tenant:
        """The tenant of a caller. Raises Unauthenticated without a key or certificate that a tenant has."""
        if self._file is None:
            return DEFAULT_TENANT
        table = self._file.current()
        if credentials.key is not None:
            tenant = table.by_key.get(hash_key(credentials.key))
            if tenant is None:
                raise Unauthenticated("no tenant of this gateway has that key")
            return tenant
        for name in credentials.certificate_names:
            if name in table.by_certificate:
                return table.by_certificate[name]
        raise Unauthenticated("this gateway needs a key: metadata or header `authorization: Bearer KEY`")


def hash_key(key: str) -> str:
    """The hash by which a keys file names a key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def open_tenants(path: Path | None, routes: Sequence[str]) -> Tenants:
    """The tenants of a file, which may name these routes; None: `default` alone.

    Raises InvalidRequest for an invalid file.
    """
    if path is None:
        return Tenants()
    return Tenants(ReloadingFile("tenants", path, lambda file: read_tenants(file, routes)))


def read_tenants(path: Path, routes: Sequence[str]) -> TenantTable:
    """Raises InvalidRequest, which names the field, where the file describes no tenants."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InvalidRequest("gateway.keys", str(path), f"it can't be read: {error}") from error
    tenants = tuple(_tenants(path, sections))
    by_key = _by("keys", tenants)
    by_certificate = _by("certificates", tenants)
    for tenant in tenants:
        for route in tenant.routes or ():
            if route not in routes:
                raise InvalidRequest(f"tenants.{tenant.name}.routes", route, f"the cluster has {', '.join(routes)}")
    return TenantTable(tenants, by_key, by_certificate)


def _tenants(path: Path, sections: Mapping[str, object]) -> Iterator[Tenant]:
    named = sections.get("tenants")
    if not isinstance(named, dict) or not named or len(sections) > 1:
        raise InvalidRequest(
            "gateway.keys", str(path), "it holds sections [tenants.NAME], at least one, and nothing else"
        )
    for name, fields in named.items():
        if not isinstance(fields, dict):
            raise InvalidRequest(f"tenants.{name}", type(fields).__name__, "it must be a section")
        try:
            yield Tenant.model_validate({**fields, "name": name})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("tenants", name, *first["loc"])))
            # Somebody may have written a key in place of its hash.
            value = "not shown" if "keys" in first["loc"] else first["input"]
            raise InvalidRequest(field, value, first["msg"]) from None


def _by(field: str, tenants: Sequence[Tenant]) -> dict[str, Tenant]:
    """The tenants by the values of a field, each of which only one tenant may have."""
    found: dict[str, Tenant] = {}
    for tenant in tenants:
        for index, value in enumerate(getattr(tenant, field)):
            if found.setdefault(value, tenant) is not tenant:
                limit = f"tenant {found[value].name} has it, too"
                raise InvalidRequest(f"tenants.{tenant.name}.{field}[{index}]", "not shown", limit)
    return found
