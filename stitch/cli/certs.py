"""`stitch certs`: writes an authority and a folder with certificate and key for every process of a cluster.

What exists is kept, so that the command can be run again for new shards; `--renew` replaces certificates and keys.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.identity import Identity, read_certificate
from stitch.issuing import Authority, Issued, load_authority, new_authority
from stitch.tls import GATEWAY, read_pem

AUTHORITY_DAYS = 3_650
# The modes of files with a key, and of those without.
PRIVATE, PUBLIC = 0o600, 0o644
MONITOR = "prometheus"
SECTION = """[tls]
authority = "{folder}/{{name}}/authority.pem"
certificate = "{folder}/{{name}}/certificate.pem"
key = "{folder}/{{name}}/key.pem"
"""


def run(parsed: argparse.Namespace) -> int:
    """Writes what is missing or to be renewed, and prints each certificate with its end and its serial number."""
    from stitch.cli.arguments import named

    cluster = load_cluster(parsed.cluster)
    certificates = CertificateSet(cluster, Path(parsed.out), timedelta(days=parsed.days))
    hosts = named(parsed.host, "--host")
    # Without names the flag is an empty list, without the flag it is None.
    renewed = () if parsed.renew is None else parsed.renew or None
    for identity, file in certificates.write(renewed, parsed.client, hosts):
        found = read_certificate(file.read_bytes())
        print(f"{identity.uri}  until {found.expires:%Y-%m-%d}  serial {found.serial:x}  {file}")
    if cluster.tls is None:
        folder = os.path.relpath(parsed.out, cluster.folder)
        print(f"\nThe cluster file doesn't use them yet; its section:\n{SECTION.format(folder=folder)}", end="")
    return 0


@dataclass(frozen=True, slots=True)
class CertificateSet:
    """The folder of a cluster's certificates: `authority.pem` and its key, and a folder for each process."""

    cluster: ClusterConfig
    folder: Path
    valid: timedelta

    def write(
        self, renew: Sequence[str] | None = (), clients: Sequence[str] = (), hosts: dict[str, str] | None = None
    ) -> Iterator[tuple[Identity, Path]]:
        """Writes certificates of processes and clients; yields those written, with the file of each.

        `renew` names those that are replaced, None: all. `hosts` has a further host name for a process.
        Raises InvalidRequest for a name that is no process, or an authority that can't be used.
        """
        processes = self._processes()
        hosts = hosts or {}
        for field, names in ("--renew", renew or ()), ("--host", hosts):
            for name in names:
                if name not in processes and name not in clients:
                    raise InvalidRequest(field, name, f"the cluster has {', '.join(processes)}")
        authority = self._authority()
        for name, (identity, own_hosts) in processes.items():
            file = self.folder / name / "certificate.pem"
            if renew is None or name in renew or not file.exists():
                issued = authority.issue(identity, [*own_hosts, *filter(None, [hosts.get(name)])], self.valid)
                write(file.with_name("authority.pem"), authority.pem.certificate, PUBLIC)
                write(file.with_name("key.pem"), issued.key, PRIVATE)
                write(file, issued.certificate, PUBLIC)
                yield identity, file
        for name in clients:
            file, identity = self.folder / f"{name}.pem", Identity(self.cluster.name, "client", name)
            if renew is None or name in renew or not file.exists():
                issued = authority.issue(identity, (), self.valid)
                write(file, issued.certificate + issued.key, PRIVATE)
                yield identity, file

    def _processes(self) -> dict[str, tuple[Identity, list[str]]]:
        """The identity of each process, and the hosts at which it is called."""
        cluster = self.cluster
        found = {
            one.name: (Identity(cluster.name, "shard", one.name), [one.dns_host or _host(one.address)])
            for one in cluster.shards
        }
        for name in {GATEWAY, MONITOR} & found.keys():
            raise InvalidRequest("shards.name", name, f"{GATEWAY} and {MONITOR} have certificates of their own")
        found[GATEWAY] = Identity(cluster.name, "gateway", GATEWAY), [_host(cluster.gateway.address), "localhost"]
        found[MONITOR] = Identity(cluster.name, "monitor", MONITOR), []
        return found

    def _authority(self) -> Authority:
        """The authority in the folder, or a new one."""
        files = [self.folder / name for name in ("authority.pem", "authority-key.pem")]
        if not files[0].exists():
            created = new_authority(self.cluster.name, timedelta(days=AUTHORITY_DAYS)).pem
            write(files[1], created.key, PRIVATE)
            write(files[0], created.certificate, PUBLIC)
        try:
            return load_authority(Issued(*(read_pem("authority", file) for file in files)))
        except ValueError as error:
            raise InvalidRequest("authority", str(files[0]), str(error)) from error


def write(file: Path, content: bytes, mode: int) -> None:
    """Writes a file so that another program sees the whole of it or the former one."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
        opened.write(content)
    draft.replace(file)


def _host(address: str) -> str:
    return address.rpartition(":")[0]
