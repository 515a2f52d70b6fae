"""Incompatible models, stitches and tokenizers are refused with an error that names both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from stitch.errors import Incompatible
from tests.support.loopback_shards import open_shards
from tests.support.tiny_cluster import CUTS, write_tiny_cluster
from tests.support.tiny_model import write_random_stitch, write_tiny_model

START_SECONDS = 120.0


def start_top(cluster_file: Path) -> tuple[int, str]:
    """Exit code and last line of a top shard that does not start."""
    command = [sys.executable, "-m", "stitch_server.cli", "run", str(cluster_file), "--shard", "top-0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    return ended.returncode, ended.stderr.splitlines()[-1]


def other_stitch(folder: Path, bottom: Path, top: Path, cut: tuple[int, int] = CUTS["weak"]) -> None:
    """Replaces the stitch of `weak`."""
    write_random_stitch(folder / "stitch.safetensors", bottom, top, *cut)


def change_tokenizer(model: Path) -> None:
    """Swaps the ids of two tokens."""
    file = model / "tokenizer.json"
    fields = json.loads(file.read_text())
    ids = fields["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(fields))


def test_shard_does_not_start_with_stitch_for_another_top_model(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    another = write_tiny_model(tmp_path / "another", seed=9, padding_rows=8)
    other_stitch(tmp_path, tmp_path / "bottom", another)
    code, message = start_top(file)
    assert code == 2
    assert message.startswith("stitch-server: the stitch from layer 3 to 2 is made for the top model another revision ")
    assert ", not for top revision " in message


async def load_error(cluster_file: Path) -> str:
    """The error with which a shard of the cluster fails to load."""
    with pytest.raises(Incompatible) as caught:
        async with open_shards(cluster_file):
            pass
    return str(caught.value)


async def test_stitch_for_another_cut_point_is_refused(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    other_stitch(tmp_path, tmp_path / "bottom", tmp_path / "top", CUTS["strong"])
    assert await load_error(file) == "the stitch from layer 4 to 3 can't serve a cut from layer 3 to 2"


async def test_stitch_for_another_tokenizer_is_refused(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    change_tokenizer(tmp_path / "top")
    assert (await load_error(file)).startswith("the stitch from layer 3 to 2 is for tokenizer ")


async def test_file_that_is_no_stitch_is_refused(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    (tmp_path / "stitch.safetensors").write_bytes(b"\0" * 64)
    assert (await load_error(file)).startswith(f"{tmp_path}/stitch.safetensors is no stitch: ")


async def session_error(cluster_file: Path) -> tuple[grpc.StatusCode, str]:
    """The status of a session whose two shards refuse each other."""
    async with open_shards(cluster_file) as shards:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await shards.generate([1, 2, 3], "weak", 2)
        assert set(shards.kv_usage().values()) == {0.0}
    return caught.value.code(), caught.value.details() or ""


async def test_handshake_refuses_different_tokenizers(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    change_tokenizer(tmp_path / "bottom")
    code, message = await session_error(file)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("the tokenizer of shard bottom-0 is ")
    assert ", that of shard top-0 is " in message


async def test_handshake_refuses_stitch_for_another_bottom_model(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path)
    another = write_tiny_model(tmp_path / "another", layers=5, hidden_size=48, heads=6, seed=9)
    other_stitch(tmp_path, another, tmp_path / "top")
    code, message = await session_error(file)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("the stitch from layer 3 to 2 is made for the bottom model another revision ")
    assert ", not for bottom revision " in message
