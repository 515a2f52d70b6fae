"""Certificates decide who reaches a shard: the laptop, the foreigner and the revoked are named in the log alone.

And new certificates of all processes, under load, cost no answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch.access import REFUSED
from stitch.channels import open_channel
from stitch.cli.certs import CertificateSet
from stitch.cluster import load_cluster
from stitch.identity import Identity
from stitch.issuing import Authority, Issued, load_authority, new_authority
from stitch.sampling import Sampling
from stitch.v1 import shard_pb2, shard_pb2_grpc
from tests.support.certificates import write_certificates
from tests.support.link_peer import LinkPeer
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

DAY = timedelta(days=1)
RELOAD_SECONDS = 0.2
NAME = "tiny"
# Every file is read twice before it counts.
TAKEN_SECONDS = 20.0
# Calls that are refused, or ask for one token.
ENDED_SECONDS = 60.0


Outcomes = dict[str, tuple[grpc.StatusCode, str]]
DENIED = (grpc.StatusCode.PERMISSION_DENIED, REFUSED)


@dataclass(frozen=True)
class Secured:
    """A cluster whose certificates are in a folder, and its authority."""

    cluster: Cluster
    folder: Path

    @property
    def authority(self) -> Authority:
        files = (self.folder / "authority.pem", self.folder / "authority-key.pem")
        return load_authority(Issued(*(file.read_bytes() for file in files)))

    def issued(self, identity: Identity, valid: timedelta = DAY) -> Issued:
        return self.authority.issue(identity, (), valid)

    def own(self, name: str) -> Issued:
        """The certificate of a process."""
        return Issued(
            (self.folder / name / "certificate.pem").read_bytes(), (self.folder / name / "key.pem").read_bytes()
        )

    def channel(self, name: str, own: Issued | None) -> grpc.aio.Channel:
        """A channel to a shard for a caller with that certificate."""
        trusted = (self.folder / name / "authority.pem").read_bytes()
        pair = (None, None) if own is None else (own.key, own.certificate)
        host = Identity(NAME, "shard", name).host
        return open_channel(self.cluster.address(name), grpc.ssl_channel_credentials(trusted, *pair), host=host)

    async def outcomes(self, own: Issued | None, hello_of: str | None = None) -> Outcomes:
        """How each call ends for a caller with that certificate, whose link says that it is the shard `hello_of`.

        The hello is of an old protocol, which a shard refuses after it has checked who calls.
        """
        found = {}
        async with (
            asyncio.timeout(ENDED_SECONDS),
            self.channel("bottom-0", own) as first,
            self.channel("top-0", own) as second,
        ):
            bottom, top = shard_pb2_grpc.ShardStub(first), shard_pb2_grpc.ShardStub(second)
            request = shard_pb2.ShardGenerateRequest(
                token_ids=[1],
                prompt_tokens=1,
                route="weak",
                chain=["top-0"],
                sampling=Sampling(max_tokens=1).to_proto(),
            )
            found["Generate"] = await _end(bottom.Generate(request))
            found["FetchTokenizer"] = await _end(bottom.FetchTokenizer(shard_pb2.FetchTokenizerRequest()))
            found["Describe"] = await _end(top.Describe(shard_pb2.ShardDescribeRequest()))
            link = LinkPeer(top.Link(None), shard_pb2.ShardIdentity(shard=hello_of or ""))
            if hello_of is not None:
                await link.send(hello=shard_pb2.Hello(protocol_version=0, identity=link.identity))
            found["Link"] = await link.refusal()
        return found


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("identities")
    file = write_tiny_cluster(folder)
    certificates = folder / "certificates"
    files = write_certificates(load_cluster(str(file)), certificates)
    (certificates / "revoked").write_text("")
    more = {"revoked": str(certificates / "revoked"), "reload_seconds": RELOAD_SECONDS}
    # Every second, calls move to a new connection.
    tls = {**files, **more, "max_connection_age_seconds": 1.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tls": tls}))
    with running_cluster(file, folder / "run") as cluster:
        yield Secured(cluster, certificates)


async def _end(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ends, after all of its messages were read."""
    with suppress(grpc.aio.AioRpcError):
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
    return await call.code(), await call.details()


async def test_gateway_asks_and_shard_links_and_both_describe(secured: Secured) -> None:
    by_gateway = await secured.outcomes(secured.own(GATEWAY))
    assert {call for call, (code, _) in by_gateway.items() if code is not grpc.StatusCode.OK} == {"Link"}
    assert by_gateway["Link"] == DENIED
    by_shard = await secured.outcomes(secured.own("bottom-0"), hello_of="bottom-0")
    assert (by_shard["Generate"], by_shard["FetchTokenizer"]) == (DENIED, DENIED)
    assert by_shard["Describe"][0] is grpc.StatusCode.OK
    assert "protocol version" in by_shard["Link"][1]


@pytest.mark.parametrize(
    "identity",
    [
        Identity(NAME, "client", "laptop"),
        Identity(NAME, "monitor", "prometheus"),
        Identity(NAME, "shard", "bottom-7"),
        Identity("foreign", "gateway", "gateway"),
        Identity("foreign", "shard", "bottom-0"),
    ],
    ids=lambda one: one.uri,
)
async def test_laptop_with_a_certificate_of_the_authority_is_refused(secured: Secured, identity: Identity) -> None:
    own = secured.issued(identity)
    assert set((await secured.outcomes(own)).values()) == {DENIED}
    for shard in ("bottom-0", "top-0"):
        lines = [line for line in secured.cluster.log(shard).splitlines() if f"{own.serial:x}" in line]
        assert len(lines) == 2
        assert all(identity.uri in line and "names no" in line for line in lines)


async def test_shard_that_says_it_is_another_one_is_refused(secured: Secured) -> None:
    assert (await secured.outcomes(secured.own("bottom-0"), hello_of="top-0"))["Link"] == DENIED
    assert "does not name shard 'top-0'" in secured.cluster.log("top-0")


@pytest.mark.parametrize("what", ["no certificate", "expired", "another authority"])
async def test_handshake_fails_with_its_reason_in_the_log_alone(secured: Secured, what: str) -> None:
    gateway = Identity(NAME, "gateway", "gateway")
    stranger, reason = {
        "no certificate": (None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        "expired": (secured.issued(gateway, valid=-DAY), "certificate has expired"),
        "another authority": (new_authority(NAME, DAY).issue(gateway, (), DAY), "unable to get local issuer"),
    }[what]
    outcomes = await secured.outcomes(stranger)
    assert {code for code, _ in outcomes.values()} == {grpc.StatusCode.UNAVAILABLE}
    assert not any(reason in details for _, details in outcomes.values())
    assert reason in secured.cluster.log("top-0")


async def test_caller_refuses_a_shard_of_another_name(secured: Secured) -> None:
    gateway = secured.own(GATEWAY)
    credentials = grpc.ssl_channel_credentials(secured.authority.pem.certificate, gateway.key, gateway.certificate)
    for host in (Identity(NAME, "shard", "top-1").host, Identity("foreign", "shard", "top-0").host):
        async with open_channel(secured.cluster.address("top-0"), credentials, host=host) as channel:
            outcome = await _end(shard_pb2_grpc.ShardStub(channel).Describe(shard_pb2.ShardDescribeRequest()))
        assert outcome[0] is grpc.StatusCode.UNAVAILABLE
        assert "Hostname Verification Check failed" in outcome[1]


class Load:
    """Clients that ask one question after another, and what they got."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]
        self.answers: list[str] = []
        self.failures: list[Exception] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stopped.is_set():
            try:
                answer = self._cluster.generate("stitch", route="strong", max_tokens=24, ignore_eos=True, timeout=60)
                self.answers.append(answer.text)
            except Exception as error:
                self.failures.append(error)


@pytest.mark.parametrize("rotations", [3, pytest.param(30, marks=pytest.mark.full)])
async def test_new_certificates_under_load_cost_no_answer_and_old_ones_can_be_revoked(
    secured: Secured, rotations: int
) -> None:
    names, first = secured.cluster.names, {name: secured.own(name) for name in secured.cluster.names}
    certificates = CertificateSet(load_cluster(str(secured.cluster.file)), secured.folder, DAY)
    async with secured.channel("top-0", first[GATEWAY]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        watched = asyncio.create_task(_end(watch))
        with Load(secured.cluster) as load:
            for _ in range(rotations):
                before = changes(secured)
                assert len(list(certificates.write(renew=names))) == len(names)
                await all_have_changed(secured, before)
                so_far = len(load.answers)
                await eventually(lambda count=so_far: load.failures or len(load.answers) > count + 10, 60)
        assert load.failures == []
        assert len(set(load.answers)) == 1
        assert not watched.done()
        before = changes(secured)
        (secured.folder / "revoked").write_text("".join(f"{own.serial:x}\n" for own in first.values()))
        await all_have_changed(secured, before)
        async with asyncio.timeout(ENDED_SECONDS):
            assert await watched == DENIED
    lines = [line for line in secured.cluster.log("top-0").splitlines() if "has been revoked" in line]
    assert any(f"{first[GATEWAY].serial:x}" in line and "Watch" in line for line in lines)
    answer = secured.cluster.generate("stitch", route="strong", max_tokens=24, ignore_eos=True, timeout=60)
    assert answer.text == load.answers[0]
    assert set((await secured.outcomes(first[GATEWAY])).values()) == {DENIED}


async def all_have_changed(secured: Secured, before: dict[str, int]) -> None:
    """Returns when every process has taken other files once since then."""
    expected = {name: count + 1 for name, count in before.items()}
    await eventually(lambda: changes(secured) == expected, TAKEN_SECONDS)


def changes(secured: Secured) -> dict[str, int]:
    """How often each process has taken other files."""
    logs = {name: secured.cluster.log(name) for name in secured.cluster.names}
    return {name: log.count("the files of [tls] have changed") for name, log in logs.items()}
