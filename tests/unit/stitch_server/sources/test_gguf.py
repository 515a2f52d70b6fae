"""A GGUF file becomes a model folder with the same weights, tokenizer and end tokens, byte for byte reproducible."""

from __future__ import annotations

import contextlib
import json
import math
import re
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


def set_version(file: Path, version: int) -> None:
    content = bytearray(file.read_bytes())
    content[4:8] = version.to_bytes(4, "little")
    file.write_bytes(content)


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

    @pytest.mark.parametrize(("add_bos_token", "first"), [(True, "<|im_start|>"), (False, "hello"), (None, "hello")])
    def test_adds_the_first_token_where_the_file_says_so(
        self, tmp_path: Path, add_bos_token: bool | None, first: str
    ) -> None:
        _, folder = round_trip(tmp_path, metadata={"tokenizer.ggml.add_bos_token": add_bos_token})
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer.encode("hello", add_special_tokens=True).tokens[0] == first
        assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
        assert AutoTokenizer.from_pretrained(folder)("hello").tokens()[0] == first

    def test_ends_need_no_token_that_only_the_template_names(self, tmp_path: Path) -> None:
        tokens = {"tokenizer.chat_template": "<|im_end|> and <|im_nothing|>", "tokenizer.ggml.eos_token_id": 0}
        assert end_tokens(read(round_trip(tmp_path, metadata=tokens)[1]), TOKENS) == [0, 2]

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

    @pytest.mark.parametrize(
        "content", [b"", b"GGUF", b"PK\x03\x04 something else entirely", b"version https://git-lfs"]
    )
    def test_refuses_a_file_of_another_format(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(Incompatible, match=r"x\.gguf is no GGUF file: "):
            imported(tmp_path / "x.gguf", tmp_path / "out")

    @pytest.mark.parametrize(
        ("version", "named"),
        [(1, "of version 1;"), (4, "of version 4;"), (3 << 24, "big-endian;"), (2 << 24, "big-endian;")],
    )
    def test_refuses_another_version_or_order(self, tmp_path: Path, version: int, named: str) -> None:
        round_trip(tmp_path)
        set_version(tmp_path / "model.gguf", version)
        with pytest.raises(Incompatible, match=rf"is {named} GGUF is read little-endian, of version 2 or 3"):
            imported(tmp_path / "model.gguf", tmp_path / "out")

    def test_reads_version_2_which_has_the_same_layout(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path)
        set_version(tmp_path / "model.gguf", 2)
        again = imported(tmp_path / "model.gguf", tmp_path / "out")
        assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.3, 0.7, 0.99, 0.9999])
    def test_refuses_a_truncated_file(self, tmp_path: Path, share: float) -> None:
        round_trip(tmp_path)
        whole = (tmp_path / "model.gguf").read_bytes()
        (tmp_path / "model.gguf").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(Incompatible, match=r"model\.gguf is a truncated or damaged GGUF file: "):
            imported(tmp_path / "model.gguf", tmp_path / "out")

    def test_refuses_an_array_that_claims_to_be_longer_than_the_file(self, tmp_path: Path) -> None:
        round_trip(tmp_path)
        content = bytearray((tmp_path / "model.gguf").read_bytes())
        # The key is followed by its type, the type of the elements, and their number.
        length = content.index(key := b"tokenizer.ggml.token_type") + len(key) + 8
        content[length : length + 8] = (1 << 60).to_bytes(8, "little")
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(Incompatible, match=r"model\.gguf is a truncated or damaged GGUF file: it has .* missing"):
            imported(tmp_path / "model.gguf", tmp_path / "out")

    @pytest.mark.parametrize("seed", range(8))
    def test_damaged_metadata_is_refused_or_read_but_never_another_error(self, tmp_path: Path, seed: int) -> None:
        round_trip(tmp_path)
        damaged = bytearray((tmp_path / "model.gguf").read_bytes())
        random = np.random.default_rng(seed)
        for at in random.integers(8, 3000, 3):
            damaged[at] = random.integers(256)
        (tmp_path / "model.gguf").write_bytes(damaged)
        with contextlib.suppress(Incompatible):
            imported(tmp_path / "model.gguf", tmp_path / "out")

    def test_refuses_another_family(self, tmp_path: Path) -> None:
        with pytest.raises(Incompatible, match=r"model\.gguf is a mamba; GGUF is read for llama, qwen2, qwen3 alone"):
            round_trip(tmp_path, metadata={"general.architecture": "mamba"})


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("general.type", "adapter"),
            ("general.quantization_version", 1),
            ("split.count", 3),
            ("split.no", 1),
            ("split.tensors.count", 99),
            ("llama.rope.scaling.type", "longrope"),
            ("llama.rope.scaling.type", "dynamic"),
            ("llama.rope.scaling.factor", 0.0),
            ("llama.rope.scaling.factor", math.nan),
            ("llama.rope.scaling.attn_factor", 1.5),
            ("llama.rope.scaling.yarn_ext_factor", 0.5),
            ("llama.rope.scaling.alpha", 2.0),
            ("llama.rope.scale_linear", 0.5),
            ("llama.rope.dimension_count", 8),
            ("llama.rope.dimension_sections", [4, 4, 0, 0]),
            ("llama.rope.freq_base", 0.0),
            ("llama.rope.freq_base_swa", 10000.0),
            ("llama.logit_scale", 0.25),
            ("llama.embedding_scale", 12.0),
            ("llama.residual_scale", 0.5),
            ("llama.attention.scale", 0.5),
            ("llama.attention.sliding_window", 1024),
            ("llama.attention.sliding_window_pattern", 2),
            ("llama.attention.key_length", 32),
            ("llama.attention.value_length", 8),
            ("llama.attention.clamp_kqv", 8.0),
            ("llama.attention.causal", False),
            ("llama.attention.head_count_kv", [2, 1]),
            ("llama.attention.layer_norm_rms_epsilon", None),
            ("llama.attention.layer_norm_rms_epsilon", math.nan),
            ("llama.attn_logit_softcapping", 50.0),
            ("llama.final_logit_softcapping", 30.0),
            ("llama.expert_count", 8),
            ("llama.expert_used_count", 2),
            ("llama.tensor_data_layout", "Meta AI original pth"),
            ("llama.use_parallel_residual", True),
            ("llama.vocab_size", 7),
            ("llama.block_count", 1_000_000_000),
            ("llama.block_count", None),
            ("llama.context_length", 0),
            ("llama.context_length", "long"),
            ("llama.a_key_of_next_year", 1),
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.model", "bert"),
            ("tokenizer.ggml.model", "t5"),
            ("tokenizer.ggml.model", None),
            ("tokenizer.ggml.pre", "tekken"),
            ("tokenizer.ggml.pre", "default"),
            ("tokenizer.ggml.pre", None),
            ("tokenizer.ggml.tokens", None),
            ("tokenizer.ggml.tokens", ["a", "b"]),
            ("tokenizer.ggml.token_type", None),
            ("tokenizer.ggml.token_type", [1, 1]),
            ("tokenizer.ggml.merges", None),
            ("tokenizer.ggml.merges", ["no such", "token s"]),
            ("tokenizer.ggml.bos_token_id", 100_000),
            ("tokenizer.ggml.eos_token_id", -1),
            ("tokenizer.ggml.add_bos_token", 3),
            ("tokenizer.ggml.add_eos_token", True),
            ("tokenizer.ggml.add_space_prefix", True),
            ("tokenizer.ggml.precompiled_charsmap", [1, 2]),
            ("tokenizer.ggml.remove_extra_whitespaces", True),
            ("tokenizer.huggingface.json", "{}"),
            ("tokenizer.chat_template", 5),
        ],
    )
    def test_with_an_effect_that_is_not_supported_is_refused_by_name(
        self, tmp_path: Path, key: str, value: Any
    ) -> None:
        # A vocabulary of another size doesn't fit the embedding.
        named = "tensor token_embd.weight" if value == ["a", "b"] else key
        named = "tensor blk.0.attn_q.weight" if key.endswith("key_length") else named
        with pytest.raises(Incompatible, match=rf"^model\.gguf: {re.escape(named)} is [^\n]+$"):
            round_trip(tmp_path, metadata={key: value})

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_an_effect_change_nothing(self, tmp_path: Path, family: str) -> None:
        neutral = {
            "general.type": "model",
            "general.file_type": 7,
            "general.sampling.temp": 0.7,
            "quantize.imatrix.file": "x.dat",
            "split.count": 1,
            "expert_count": 0,
            "logit_scale": 1.0,
            "attention.scale": 0.25,
            "attention.sliding_window": 2048,
            "attention.value_length": 16,
            "rope.dimension_count": 16,
            "rope.scaling.type": "none",
            "rope.scaling.factor": 4.0,
            "rope.scaling.finetuned": True,
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.fim_pre_token_id": 7,
            "tokenizer.chat_template.tool_use": "",
        }
        outside = ("general", "quantize", "split", "tokenizer")
        metadata = {key if key.split(".")[0] in outside else f"{family}.{key}": neutral[key] for key in neutral}
        _, plain = round_trip(tmp_path, family)
        (tmp_path / "again").mkdir()
        _, folder = round_trip(tmp_path / "again", family, metadata=metadata)
        for file in plain.iterdir():
            assert file.read_bytes() == (folder / file.name).read_bytes()


class TestRope:
    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [
            ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
            ({"scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
            ({"scaling.type": "linear", "scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
            ({"scaling.factor": 2.0, "scale_linear": 4.0}, {"rope_type": "linear", "factor": 2.0}),
            (
                {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            ),
            (
                {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_beta_fast": 16.0},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0},
            ),
        ],
    )
    @pytest.mark.parametrize("family", FAMILIES)
    def test_scaling_gives_the_logits_of_transformers(
        self, tmp_path: Path, family: str, metadata: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        scaled = {f"{family}.rope.{key}": value for key, value in metadata.items()}
        model, folder = round_trip(tmp_path, family, metadata=scaled)
        assert not torch.allclose(their_logits(folder), their_logits(model))
        config = json.loads((model / "config.json").read_text())
        config["rope_parameters"] |= expected
        (model / "config.json").write_text(json.dumps(config))
        torch.testing.assert_close(their_logits(folder), their_logits(model))

    def test_type_without_a_factor_changes_nothing(self, tmp_path: Path) -> None:
        _, folder = round_trip(tmp_path, metadata={"llama.rope.scaling.type": "linear"})
        assert read_config(folder).rope_parameters["rope_type"] == "default"


class TestTensors:
    @pytest.mark.parametrize(
        ("family", "name", "shape"),
        [
            ("llama", "rope_freqs.weight", (8,)),
            ("llama", "rope_factors_long.weight", (8,)),
            ("llama", "blk.0.attn_q.bias", (64,)),
            ("qwen2", "blk.0.attn_output.bias", (64,)),
            ("qwen2", "blk.0.attn_q_norm.weight", (16,)),
            ("qwen3", "blk.1.ffn_gate_exps.weight", (2, 192, 64)),
            ("qwen3", "blk.2.ffn_gate.weight", (192, 64)),
            ("llama", "output.bias", (363,)),
        ],
    )
    def test_without_a_place_is_refused(self, tmp_path: Path, family: str, name: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(Incompatible, match=rf"tensor {name} is \(.*; a {family} with these metadata has none"):
            round_trip(tmp_path, family, tensors={name: np.ones(shape, np.float32)})

    @pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "blk.0.attn_k.bias"])
    def test_missing_one_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(Incompatible, match=rf"tensor {name} is missing; a qwen2 with these metadata has \("):
            round_trip(tmp_path, "qwen2", tensors={name: None})

    @pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_k.weight", "output.weight"])
    def test_of_another_shape_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(Incompatible, match=rf"tensor {name} is \(3, 32\); a llama with these metadata has \("):
            round_trip(tmp_path, tensors={name: np.ones((3, 32), np.float32)})
