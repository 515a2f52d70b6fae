"""The real pair Qwen2.5-Coder 1.5B and 0.5B, joined by a stitch that this test fits on a few tokens."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stitch.environment import cache_folder
from tests.support.processes import Cluster, running_cluster

NAMES = ("qwen2.5-coder-1.5b-instruct-q4_k_m", "qwen2.5-coder-0.5b-instruct-q4_k_m")
FILES = [cache_folder() / "models" / f"{name}.gguf" for name in NAMES]
MISSING = [str(file) for file in FILES if not file.is_file()]

pytestmark = [
    pytest.mark.qwen,
    pytest.mark.slow,
    pytest.mark.timeout(1_200),
    pytest.mark.skipif(bool(MISSING), reason=f"the weights are not there: {', '.join(MISSING)}"),
]

# Late in both models, where a stitch that is fitted on few tokens has the lowest loss.
BOTTOM_LAYERS, TOP_FROM = 24, 17
# By the tokens that the stitch is fitted on, words of which an answer to the question has one. A stitch that is fitted
# on few begins with a comment and repeats it.
ANSWER_WORDS = {1_024: ("```python",), 4_096: ("def ", "return", "add")}
FITTED = [1_024, pytest.param(4_096, marks=pytest.mark.full)]


def write_cluster(folder: Path) -> Path:
    fields = {
        "name": "qwen",
        "models": {
            "bottom": {"id": "Qwen/Qwen2.5-Coder-1.5B-Instruct", "source": str(FILES[0])},
            "top": {"id": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "source": str(FILES[1])},
        },
        "routes": [
            {"name": "strong", "bottom_layers": BOTTOM_LAYERS, "top_from": TOP_FROM, "stitch": "strong.safetensors"}
        ],
        "shards": [
            {"name": "bottom-0", "role": "bottom", "layers": [0, BOTTOM_LAYERS], "address": "127.0.0.1:0"},
            {"name": "top-0", "role": "top", "layers": [TOP_FROM, 24], "address": "127.0.0.1:0"},
        ],
        "gateway": {"address": "127.0.0.1:0"},
        "compute": {"kv_tokens": 2048},
    }
    file = folder / "cluster.json"
    file.write_text(json.dumps(fields))
    return file


def write_text(folder: Path) -> Path:
    """Writes modules of the standard library as text, which changes of this project do not affect."""
    file = folder / "sources.jsonl"
    texts = [inspect.getsource(module) for module in (argparse, contextlib, textwrap, tempfile)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module", params=FITTED)
def fitted_tokens(request: pytest.FixtureRequest) -> int:
    """The tokens that the stitch is fitted on."""
    tokens: int = request.param
    return tokens


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, fitted_tokens: int) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("qwen")
    file = write_cluster(folder)
    held_out_tokens = max(256, fitted_tokens // 8)
    amounts = ["--tokens", str(fitted_tokens), "--held-out-tokens", str(held_out_tokens), "--sequence-tokens", "256"]
    command = [sys.executable, "-m", "stitch_training.cli", "fit", str(file), "--route", "strong", "--epochs", "0"]
    data = ["--data", str(write_text(folder)), "--out", str(folder / "strong.safetensors")]
    subprocess.run([*command, *data, *amounts], check=True)
    with running_cluster(file, folder / "run") as running:
        yield running


def test_describe_reports_the_sizes_of_both_models(cluster: Cluster) -> None:
    described = cluster.client.describe()
    assert (described.bottom.hidden_size, described.bottom.layers) == (1536, 28)
    assert (described.top.hidden_size, described.top.layers) == (896, 24)
    assert [route.name for route in described.routes] == ["strong"]
    assert described.routes[0].stitch


def test_fitted_pair_answers_a_coding_question(cluster: Cluster, fitted_tokens: int) -> None:
    messages = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    answer = cluster.generate(messages=messages, max_tokens=48)
    print(answer.text)
    assert answer.route == "strong"
    assert answer.generated_tokens > 8
    assert any(word in answer.text for word in ANSWER_WORDS[fitted_tokens])
    again = cluster.generate(messages=messages, max_tokens=48)
    assert again.token_ids == answer.token_ids
