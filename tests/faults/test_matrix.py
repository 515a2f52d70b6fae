"""Every fault at every moment at every role: with a replica no answer changes, without one its client is told.

Each cell is one story. Four answers run, greedy and sampled, on both routes; a process is struck; a newcomer asks; the
fault ends. Then every answer is the one that the models give, or UNAVAILABLE with the number of tokens that came, all
KV is free, and the next story begins. By default a few of the cells run, by `-m full` all of them with one micro-batch
and with two, and by `-m full -k pairwise` a choice in which all pairs occur.

Where `-m full` makes a shard silent that has a replica, newcomers ask five short questions a second, at random moments
from BEFORE_SECONDS before the fault until AFTER_SECONDS after its end. It lasts SILENT_SECONDS. What they wait for the
last token of their answers is compared with the waits of others, beside the same answers without a fault.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from tests.support.certificates import write_certificates
from tests.support.exact_answers import ExactAnswers
from tests.support.fault_cells import SLOW, Cell, End, Fault, Moment, Role, all_cells, few_cells, pairwise_cells
from tests.support.newcomers import newcomers, newcomers_of, percentile
from tests.support.processes import CLIENT, GATEWAY, Cluster, running_cluster
from tests.support.running_streams import RunningStream, RunningStreams
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.waiting import becomes_true

OTHER_GATEWAY = "gateway-1"
PAIRWISE = pairwise_cells()
STAGES = {Role.FIRST: ("bottom-0", "bottom-1"), Role.MIDDLE: ("bottom-2", "bottom-3"), Role.LAST: ("top-0", "top-1")}
SHARDS = [name for stage in STAGES.values() for name in stage]
LINKS = [*product(STAGES[Role.FIRST], STAGES[Role.MIDDLE]), *product(STAGES[Role.MIDDLE], STAGES[Role.LAST])]
GATES = [(CLIENT, GATEWAY), *((GATEWAY, name) for name in STAGES[Role.FIRST]), *LINKS]
# Nothing takes this long; what does is hung.
HUNG_SECONDS = 30.0
RELEASE_SECONDS = 15.0
# An answer without a chain is given up after this; two faults one after the other may take up one second of it.
REPLAY_WAIT_SECONDS = 3.0
# Slow enough that a prefill or a replay lasts until it is struck.
SLOW_BYTES_PER_SECOND = 400_000
# What is only slow lasts this long.
SLOW_SECONDS = 0.5
# Of the newcomers.
ALONE_SECONDS, BEFORE_SECONDS, SILENT_SECONDS, AFTER_SECONDS = 10.0, 1.0, 12.0, 4.0
# A newcomer that waits for this much longer than twice its usual time was not moved in time; few may be so slow.
NEWCOMER_SECONDS = 1.0
SLOW_SHARE = 0.05
PROMPT_TOKENS, LONG_PROMPT_CHARACTERS = 12, 900
SAMPLING: tuple[dict[str, Any], ...] = (
    {"route": "weak"},
    {"route": "strong"},
    {"route": "weak", "temperature": 0.7, "seed": 5},
    {"route": "strong", "temperature": 1.0, "seed": 6},
)


def requests_of(cell: Cell, seed: str = "") -> list[dict[str, Any]]:
    """Four requests: long prompts that no earlier cell has sent, or short ones with long answers."""
    draw = Random(f"{cell}{seed}")
    is_long = cell.moment is Moment.PREFILL
    length, answer = (LONG_PROMPT_CHARACTERS, 12) if is_long else (PROMPT_TOKENS, 120)
    return [
        {"prompt": "".join(draw.choices("abcdefgh", k=length)), "max_tokens": answer, "ignore_eos": True, **sampling}
        for sampling in SAMPLING
    ]


class Stage:
    """The cluster on which every story is told: three stages and two gateways, each with a replica."""

    def __init__(self, cluster: Cluster, exact: ExactAnswers) -> None:
        self.cluster = cluster
        self.client = cluster.client_of(cluster.gate(CLIENT, GATEWAY).address)
        self.other_client = cluster.client_of(cluster.address(OTHER_GATEWAY))
        self._exact = exact

    def prepare(self, cell: Cell) -> None:
        """Two processes of the cell's role serve, or one alone, and at least one of every other role."""
        wanted = [GATEWAY, OTHER_GATEWAY]
        for role, names in STAGES.items():
            running = [name for name in names if self.cluster.running(name)]
            if role is not cell.role:
                wanted += running or names[:1]
            elif cell.replica:
                wanted += names
            else:
                wanted += running[:1] or names[:1]
                for name in running[1:]:
                    self.cluster.kill(name)
        for name in wanted:
            if not self.cluster.running(name):
                self.cluster.start(name)
        self.cluster.wait_until_serving(*wanted)
        assert becomes_true(self.is_settled, RELEASE_SECONDS)

    def repair(self) -> None:
        """Ends every fault, and starts no process: `prepare` does."""
        for gate in self.cluster.gates.values():
            gate.heal()
        for name in self.cluster.names:
            self.cluster.resume(name)

    def is_settled(self) -> bool:
        """Whether the gateway reaches exactly the shards that run, and these are idle."""
        try:
            shards = self.client.describe(timeout=HUNG_SECONDS).shards
        except Unavailable:
            return False
        return all(shard.serving == self.cluster.running(shard.name) for shard in shards) and self.idle()

    def idle(self) -> bool:
        """Whether no shard that runs holds KV."""
        running = [name for name in SHARDS if self.cluster.running(name)]
        return all(self.cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0 for name in running)

    def target(self, cell: Cell) -> str:
        """The process to strike: one that holds KV now, if any does."""
        if cell.role is Role.GATEWAY:
            return GATEWAY
        running = [name for name in STAGES[cell.role] if self.cluster.running(name)]
        return next(filter(self.uses_kv, running), running[0])

    def uses_kv(self, name: str) -> bool:
        return self.cluster.metric(name, "stitch_kv_cache_usage_ratio") > 0

    def gates_to(self, target: str) -> list[Any]:
        """The gates on the connections over which the target is asked to compute."""
        return [gate for (_, callee), gate in self.cluster.gates.items() if callee == target]

    def reach(self, cell: Cell, streams: RunningStreams) -> str:
        """Returns at the cell's moment, after the requests were sent, with the process to strike."""
        if cell.moment is Moment.PREFILL:
            names = STAGES[Role.FIRST if cell.role is Role.GATEWAY else cell.role]
            computing = lambda: any(map(self.uses_kv, filter(self.cluster.running, names)))  # noqa: E731
            assert becomes_true(computing, HUNG_SECONDS)
            return self.target(cell)
        assert becomes_true(lambda: min(streams.tokens) > 2, HUNG_SECONDS), streams.tokens
        target = self.target(cell)
        if cell.moment is Moment.DRAINING:
            self.start_draining(target)
        elif cell.moment is Moment.REPLAYING:
            self.start_replays()
            target = self.target(cell)
        return target

    def start_draining(self, target: str) -> None:
        self.cluster.terminate(target)
        assert becomes_true(lambda: not self.cluster.serves(target), HUNG_SECONDS)

    def start_replays(self) -> None:
        """Cuts the links, so that every answer is continued by other links or the same ones opened anew."""
        before = self.cluster.metric(GATEWAY, "stitch_replays_total")
        self.throttle_links()
        for link in LINKS:
            self.cluster.gate(*link).cut()
        assert becomes_true(lambda: self.cluster.metric(GATEWAY, "stitch_replays_total") > before, HUNG_SECONDS)

    def throttle_links(self) -> None:
        for link in LINKS:
            self.cluster.gate(*link).throttle(SLOW_BYTES_PER_SECOND)

    def heal_links(self) -> None:
        for link in LINKS:
            self.cluster.gate(*link).heal()

    def strike(self, fault: Fault, target: str) -> None:
        signals = {Fault.STOP: signal.SIGSTOP, Fault.TERM: signal.SIGTERM}
        if fault is Fault.KILL:
            self.cluster.kill(target)
        elif fault in signals:
            self.cluster.signal(target, signals[fault])
        for gate in self.gates_to(target):
            match fault:
                case Fault.STALL:
                    gate.stall()
                case Fault.HALF_OPEN:
                    gate.half_open()
                case Fault.CUT:
                    gate.cut()
                case Fault.THROTTLE:
                    gate.throttle(20_000)
                case Fault.DELAY:
                    gate.delay(0.05)
                case Fault.GARBLE:
                    gate.garble()

    def is_exact(self, stream: RunningStream) -> bool:
        """Whether the tokens that came, all of them or the first ones, are those that the models give."""
        request = {name: value for name, value in stream.fields.items() if name not in ("max_tokens", "ignore_eos")}
        return self._exact.continuation(token_ids=stream.token_ids, **request) == stream.token_ids

    def wait_for_the_end_of_the_fault(self, cell: Cell, streams: RunningStreams) -> None:
        """Until everybody is served who has to be, or else is told that nobody serves him."""
        before = streams.tokens
        if cell.replica:
            self.serve_newcomer(self.other_client if cell.role is Role.GATEWAY else self.client)
        if cell.fault in SLOW:
            time.sleep(SLOW_SECONDS)
        elif cell.role is not Role.GATEWAY:
            goes_on = lambda: cell.replica and streams.have_more_than(before)  # noqa: E731
            assert becomes_true(lambda: goes_on() or not streams.running, HUNG_SECONDS), (before, streams.tokens)

    def serve_newcomer(self, client: Client) -> None:
        """A short answer that is asked for now comes whole."""
        newcomer = RunningStreams(client, [{"prompt": "new", "route": "weak", "max_tokens": 4, "ignore_eos": True}])
        assert newcomer.ended(HUNG_SECONDS)
        assert newcomer.streams[0].finished, newcomer.streams[0]
        print(f"newcomer: {newcomer.streams[0].longest_pause:.2f} s")


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The parameter is the number of micro-batches."""
    folder: Path = tmp_path_factory.mktemp("pair")
    layers: dict[str, Any] = {"bottoms": [(0, 2), (0, 2), (2, 4), (2, 4)], "tops": [(2, 4), (2, 4)]}
    file = write_tiny_cluster(folder, num_micro_batches=request.param, **layers)
    # Garbled bytes must be found out, so everything is encrypted.
    tls = write_certificates(load_cluster(str(file)), folder / "certificates")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tls": tls}))
    flags = {GATEWAY: ["--replay-wait-seconds", str(REPLAY_WAIT_SECONDS)]}
    with running_cluster(file, tmp_path_factory.mktemp("run"), GATES, 2, flags) as cluster:
        stage = Stage(cluster, ExactAnswers(folder))
        yield stage
        stage.repair()


def tell(stage: Stage, cell: Cell, lasts_seconds: float = 0.0) -> tuple[str, RunningStreams]:
    """Strikes at the cell's moment and ends the fault, which lasts so long at least.

    Returns the process that was struck, and the answers.
    """
    if cell.moment is Moment.BEFORE:
        target = stage.target(cell)
        stage.strike(cell.fault, target)
        streams = RunningStreams(stage.client, requests_of(cell))
    else:
        if cell.moment is Moment.PREFILL:
            stage.throttle_links()
        streams = RunningStreams(stage.client, requests_of(cell))
        target = stage.reach(cell, streams)
        stage.heal_links()
        stage.strike(cell.fault, target)
    ends_at = time.monotonic() + lasts_seconds
    stage.wait_for_the_end_of_the_fault(cell, streams)
    time.sleep(max(0.0, ends_at - time.monotonic()))
    stage.repair()
    assert streams.ended(HUNG_SECONDS), streams.tokens
    return target, streams


def check_end(stage: Stage, cell: Cell, stream: RunningStream) -> None:
    """The stream ended as the cell allows; whatever came is what the models give."""
    assert stage.is_exact(stream), stream
    if stream.finished:
        assert End.WHOLE in cell.ends, stream
        assert len(stream.token_ids) == stream.fields["max_tokens"]
        return
    assert End.UNAVAILABLE in cell.ends, stream
    assert stream.error is not None
    if cell.role is not Role.GATEWAY:
        assert isinstance(stream.error, Unavailable), stream
        # Errors name shards, and have no addresses.
        assert "127.0.0.1" not in str(stream.error)
        # The gateway may hold back tokens of half a character.
        assert stream.error.generated_tokens >= len(stream.token_ids)


def tell_among_newcomers(stage: Stage, cell: Cell) -> tuple[str, RunningStreams]:
    """Tells the story while newcomers come, of whom at most SLOW_SHARE wait for long."""
    answers = RunningStreams(stage.client, requests_of(cell, "alone"))
    alone = newcomers_of(stage.client, f"{cell} alone", ALONE_SECONDS)
    assert answers.ended(HUNG_SECONDS)
    with newcomers(stage.client, str(cell)) as come:
        time.sleep(BEFORE_SECONDS)
        told = tell(stage, cell, SILENT_SECONDS)
        time.sleep(AFTER_SECONDS)
    waits = come.waits
    usual, most = percentile(alone.waits), percentile(waits)
    slow = [wait for wait in waits if wait > 2 * usual]
    print(f"newcomers: p95 of {len(alone.waits)} without the fault {usual:.3f} s; of {len(waits)} with it {most:.3f} s")
    print(f"{most / usual:.2f} times as long; {len(slow)} over twice that, the longest {max(waits):.2f} s")
    assert sum(wait > 2 * usual + NEWCOMER_SECONDS for wait in waits) <= SLOW_SHARE * len(waits), sorted(slow)
    return told


def play(
    stage: Stage,
    cell: Cell,
    record_property: Any,
    tell: Callable[[Stage, Cell], tuple[str, RunningStreams]] = tell,
) -> None:
    stage.prepare(cell)
    try:
        target, streams = tell(stage, cell)
    finally:
        stage.repair()
    pause = max(stream.longest_pause for stream in streams.streams)
    record_property("longest_pause_seconds", round(pause, 3))
    print(f"{cell}: longest pause {pause:.2f} s")
    for stream in streams.streams:
        check_end(stage, cell, stream)
    if cell.ends_process:
        assert stage.cluster.wait_for_end(target) == (-signal.SIGKILL if cell.fault is Fault.KILL else 0)
    assert becomes_true(stage.idle, RELEASE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1], ids=["one-group"], indirect=True)
@pytest.mark.parametrize("cell", few_cells(), ids=str)
def test_fault(stage: Stage, cell: Cell, record_property: Any) -> None:
    play(stage, cell, record_property)


# `-k pairwise` selects a tenth of them.
@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2], ids=["one-group", "two-groups"], indirect=True)
@pytest.mark.parametrize("cell", all_cells(), ids=lambda cell: f"{cell}-pairwise" if cell in PAIRWISE else str(cell))
def test_fault_of_the_whole_matrix(stage: Stage, cell: Cell, record_property: Any) -> None:
    play(stage, cell, record_property, tell_among_newcomers if cell.is_silent else tell)
