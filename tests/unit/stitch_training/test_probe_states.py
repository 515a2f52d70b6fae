"""What training reads of a prompt is what the first shard reads of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from router_gateway.requests.pipeline import tokenize
from router_gateway.tokenization.chat_template import Turn
from router_gateway.tokenization.vocabulary import FILES, Vocabulary
from stitch.errors import Incompatible, InvalidRequest
from stitch.sampling import Sampling
from stitch_server.engine.types import Batch, LayerRange, Segment, Session
from stitch_server.model.probe import pooled
from stitch_training.probe_states import PromptReader, chat_encoder, plain_encoder
from tests.support.runner_chain import CPU, new_runner
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_probe import drawn

LAYER = 3
TEXTS = ["stitch", "Wo liegt das?", "日本語 🙂", " two  spaces\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def ignore(done: int, of: int) -> None:
    pass


def test_states_are_those_of_a_shard(folder: Path) -> None:
    from stitch_server.model.embedding_and_head import Embedding

    reader = PromptReader.load(folder, LAYER, 20, torch.float32, chat=False)
    prompts = [drawn(seed, tokens) for seed, tokens in enumerate((1, 7, 20, 33, 7, 21))]
    seen = reader.see(prompts, ignore)
    runner = new_runner(folder, 0, LAYER, embed=Embedding.load(folder, CPU, torch.float32))
    for row, prompt in zip(seen, prompts, strict=True):
        sequence = Session("weak", (), Sampling(), prompt, len(prompt))
        segment = Segment(sequence, LayerRange(0, LAYER), 0, len(prompt), True, range(4))
        states = runner.run(Batch((segment,))).hidden
        assert np.allclose(row, pooled(states[:20]).numpy(), atol=1e-5)


def test_progress_reaches_the_end(folder: Path) -> None:
    reader = PromptReader.load(folder, 1, 8, torch.float32, chat=False)
    told: list[tuple[int, int]] = []
    reader.read(TEXTS, lambda done, of: told.append((done, of)))
    assert told[-1] == (len(TEXTS), len(TEXTS))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_tokenized_as_the_gateway_does_it(folder: Path, text: str) -> None:
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    vocabulary = Vocabulary.from_files(files)
    assert plain_encoder(folder)(text) == tokenize(text, vocabulary)
    assert chat_encoder(folder)(text) == tokenize((Turn("user", text),), vocabulary)


def test_an_empty_prompt_is_named(folder: Path) -> None:
    reader = PromptReader.load(folder, 1, 8, torch.float32, chat=False)
    with pytest.raises(InvalidRequest, match="prompt 2"):
        reader.see([[1], []], ignore)


def test_a_model_without_a_template_has_no_chats(folder: Path, tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare", layers=1)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(Incompatible, match="no chat template"):
        chat_encoder(bare)
