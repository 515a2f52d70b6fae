"""A GGUF file becomes a model folder with the same weights, tokenizer and end tokens, byte for byte reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stitch.errors import Incompatible
from stitch.tokenizer_files import end_tokens, read, token_count, tokenizer_hash
from stitch_server.model.description import ModelDescription, read_config
from stitch_server.sources import gguf as gguf_source
from stitch_server.sources import report_nothing
from stitch_server.sources.gguf import import_gguf, tensors_per_file
from tests.support.byte_tokenizer import CHAT_TEMPLATE
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model import TOKENS, write_tiny_model
from tests.support.whole_model import their_logits

FAMILIES = ("llama", "qwen2", "qwen3")


def imported(file: Path, folder: Path) -> Path:
    folder.mkdir()
    import_gguf(file, folder, report_nothing)
    return folder


def round_trip(tmp_path: Path, family: str = "llama", **gguf_settings: Any) -> tuple[Path, Path]:
    """A tiny model's folder, and what came back from its GGUF file."""
    model = write_tiny_model(tmp_path / "model", family, layers=2, hidden_size=64, padding_rows=3)
    file = write_tiny_gguf(tmp_path / "model.gguf", model, **gguf_settings)
    return model, imported(file, tmp_path / "imported")


class TestWeights:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equal_those_of_the_model(self, tmp_path: Path, family: str) -> None:
        model, folder = round_trip(tmp_path, family)
        before, after = (load_file(path / "model.safetensors") for path in (model, folder))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor)
        torch.testing.assert_close(their_logits(folder), their_logits(model))

    @pytest.mark.parametrize("quantization", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
    def test_equal_the_dequantized_values(self, tmp_path: Path, quantization: GGMLQuantizationType) -> None:
        model, folder = round_trip(tmp_path, "qwen2", quantization=quantization)
        name = "model.layers.1.mlp.up_proj.weight"
        stored = load_file(model / "model.safetensors")[name]
        expected = gguf.dequantize(gguf.quantize(stored, quantization), quantization)
        np.testing.assert_array_equal(load_file(folder / "model.safetensors")[name], expected)
        assert not np.array_equal(expected, stored)

    def test_of_a_tied_head_are_stored_once(self, tmp_path: Path) -> None:
        model = write_tiny_model(tmp_path / "model", layers=1, tie_word_embeddings=True)
        folder = imported(write_tiny_gguf(tmp_path / "x.gguf", model), tmp_path / "imported")
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        torch.testing.assert_close(their_logits(folder), their_logits(model))

    def test_may_fill_several_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gguf_source, "FILE_BYTES", 60_000)
        model, folder = round_trip(tmp_path)
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        torch.testing.assert_close(their_logits(folder), their_logits(model))
        assert ModelDescription.read(folder, "x").revision == ModelDescription.read(model, "x").revision

    @pytest.mark.parametrize(
        ("sizes", "counts"), [([5, 5, 5, 5], [2, 2]), ([5], [1]), ([25, 1, 1], [1, 2]), ([3, 3, 3, 3, 9], [4, 1])]
    )
    def test_are_split_into_files_by_size(self, sizes: list[int], counts: list[int]) -> None:
        assert tensors_per_file(sizes, 10) == counts


class TestConfig:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_has_the_sizes_of_the_model(self, tmp_path: Path, family: str) -> None:
        model, folder = round_trip(tmp_path, family)
        before, after = read_config(model), read_config(folder)
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
        for name in (*sizes, *heads):
            assert getattr(after, name, None) == getattr(before, name, getattr(after, name, None)), name
        assert after.rope_parameters["rope_theta"] == before.rope_parameters["rope_theta"]

    def test_has_the_epsilon_as_a_short_decimal(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path)
        assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-6


class TestTokenizer:
    def test_equals_that_of_the_model_without_padding(self, tmp_path: Path) -> None:
        model, folder = round_trip(tmp_path)
        assert tokenizer_hash(folder) == tokenizer_hash(model)
        assert token_count(folder) == TOKENS

    def test_reads_and_writes_text(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "<|im_start|>the fox, 1234 Übergrößen 🦊\n\n  jumps<|im_end|>"
        encoded = tokenizer.encode(text)
        assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize(("splitting", "pieces"), [("smollm", 4), ("qwen2", 4), ("gpt-2", 1)])
    def test_splits_digits_as_the_family(self, tmp_path: Path, splitting: str, pieces: int) -> None:
        _, folder = round_trip(tmp_path, splitting=splitting)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert len(tokenizer.pre_tokenizer.pre_tokenize_str("1234")) == pieces

    def test_keeps_chat_template_and_special_tokens(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "hello"}]
        rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == rendered
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")

    @pytest.mark.parametrize(
        ("metadata", "ends"),
        [
            ({}, (2, 0)),
            ({"tokenizer.ggml.eos_token_id": 0}, (0, 2)),
            ({"tokenizer.ggml.eot_token_id": 5}, (2, 5, 0)),
            ({"tokenizer.ggml.padding_token_id": None, "tokenizer.chat_template": None}, (2,)),
        ],
    )
    def test_ends_at_the_end_of_text_and_of_a_turn(
        self, tmp_path: Path, metadata: dict[str, Any], ends: tuple[int, ...]
    ) -> None:
        _, folder = round_trip(tmp_path, metadata=metadata)
        assert end_tokens(read(folder), TOKENS) == list(ends)


class TestImport:
    def test_makes_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path)
        again = imported(tmp_path / "model.gguf", tmp_path / "again")
        assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in again.iterdir())
        for file in folder.iterdir():
            assert file.read_bytes() == (again / file.name).read_bytes()

    def test_reports_its_progress(self, tmp_path: Path) -> None:
        round_trip(tmp_path)
        reported: list[tuple[str, float]] = []
        (tmp_path / "third").mkdir()
        import_gguf(
            tmp_path / "model.gguf", tmp_path / "third", lambda what, fraction: reported.append((what, fraction))
        )
        shares = [share for _, share in reported]
        assert (shares, reported[-1]) == (sorted(shares), ("importing model.gguf", 1.0))

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04 something else entirely"])
    def test_refuses_a_file_of_another_format(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(Incompatible, match=r"x\.gguf is no GGUF file: "):
            imported(tmp_path / "x.gguf", tmp_path / "out")

    def test_refuses_another_family(self, tmp_path: Path) -> None:
        with pytest.raises(Incompatible, match=r"model\.gguf is a mamba; GGUF is read for llama, qwen2, qwen3 alone"):
            round_trip(tmp_path, metadata={"general.architecture": "mamba"})

    def test_refuses_scaled_rope(self, tmp_path: Path) -> None:
        with pytest.raises(Incompatible, match="scales its rotary embedding"):
            round_trip(tmp_path, metadata={"llama.rope.scaling.type": "linear"})

    @pytest.mark.parametrize(
        ("metadata", "named"),
        [({"tokenizer.ggml.model": "llama"}, "llama"), ({"tokenizer.ggml.pre": "tekken"}, "tekken")],
    )
    def test_refuses_another_tokenizer(self, tmp_path: Path, metadata: dict[str, str], named: str) -> None:
        with pytest.raises(Incompatible, match=rf"has the tokenizer .*{named}"):
            round_trip(tmp_path, metadata=metadata)
