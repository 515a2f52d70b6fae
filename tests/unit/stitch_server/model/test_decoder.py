"""Layers of every family compute what `transformers` computes, over any ranges of layers and chunks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import Quantization
from stitch.errors import Incompatible
from stitch_server.attention import backend_for
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model import compiled_layers, hf_layers, llama, llama_loader
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import Adapted, DecoderLayers
from stitch_server.model.description import read_config
from stitch_server.model.linear import PlainLinear
from stitch_server.model.llama_config import LlamaConfig
from stitch_server.model.quantized import from_int4, to_int4, to_int8
from stitch_server.model.weights import WeightFormat, Weights
from tests.support.reference_attention import ReferenceAttention
from tests.support.tiny_model import NATIVE_FAMILIES, write_tiny_model
from tests.support.whole_model import CPU, PROMPT, our_logits, their_logits

pytestmark = pytest.mark.slow

WHOLE = (0, len(PROMPT))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# What a family can be configured to do beyond its defaults.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("qwen2", {"hidden_act": "relu"}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 16}),
    ("llama", {"kv_heads": 4}),
    ("llama", {"kv_heads": 1}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen2", {"rope_parameters": YARN_ROPE}),
    ("mistral", {"rope_parameters": LINEAR_ROPE}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True}),
    ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    ("granite", {"attention_multiplier": 0.3}),
    ("cohere", {"logit_scale": 0.5}),
    ("cohere2", {"sliding_window": 6}),
    ("phi3", {"sliding_window": 6}),
    ("starcoder2", {"sliding_window": 6}),
]
NATIVE_VARIANTS = [
    (family, config) for family, config in VARIANTS if family in NATIVE_FAMILIES and "hidden_act" not in config
]


@pytest.mark.parametrize("family", [*NATIVE_FAMILIES, *hf_layers.FAMILIES])
def test_every_family_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path, family)
    theirs = their_logits(folder)
    torch.testing.assert_close(our_logits(folder, (0, 4), WHOLE), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_logits(folder, (0, 1, 3, 4), (0, 11, 12, 13, 30, 40)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=str)
def test_every_variant_computes_what_transformers_computes(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder = write_tiny_model(tmp_path, family, **config)
    torch.testing.assert_close(our_logits(folder, (0, 4), (0, 30, 31, 40)), their_logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_three_threads")
class TestKernels:
    """Layers that are packed for the CPU kernels."""

    # Single tokens, with chunks in between.
    CHUNKS = (0, 1, 2, 4, 5, 30, 31, 34, *range(35, 41))

    @pytest.mark.parametrize(
        ("family", "config"), [*((family, {}) for family in NATIVE_FAMILIES), *NATIVE_VARIANTS], ids=str
    )
    def test_compute_what_transformers_computes(self, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
        folder = write_tiny_model(tmp_path, family, **config)
        ours = our_logits(folder, (0, 1, 4), self.CHUNKS, weight_format=WeightFormat(kernels=True))
        torch.testing.assert_close(ours, their_logits(folder), rtol=1e-4, atol=1e-4)

    def test_compute_the_same_on_one_thread_as_on_three(self, tmp_path: Path) -> None:
        folder, weight_format = write_tiny_model(tmp_path, "qwen3"), WeightFormat(kernels=True)
        shared = our_logits(folder, (0, 4), self.CHUNKS, weight_format=weight_format)
        torch.set_num_threads(1)
        alone = our_logits(folder, (0, 4), self.CHUNKS, weight_format=weight_format)
        torch.testing.assert_close(alone, shared, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("quantization", ["int8", "int4"])
    def test_compute_with_quantized_weights_and_exact_inputs(
        self, tmp_path: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, weight_format = write_tiny_model(tmp_path, "qwen3"), WeightFormat(quantization, kernels=True)
        compiled = our_logits(folder, (0, 4), range(41), weight_format=weight_format)

        def dequantized(weight: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat) -> PlainLinear:
            if quantization == "int4":
                return PlainLinear(from_int4(to_int4(weight))[:, : weight.shape[1]], bias)
            int8, scales = to_int8(weight)
            return PlainLinear(int8 * scales[:, None], bias)

        monkeypatch.setattr(llama_loader, "linear", dequantized)
        torch.testing.assert_close(compiled, our_logits(folder, (0, 4), WHOLE), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(self, tmp_path: Path, family: str) -> None:
        folder = write_tiny_model(tmp_path, family)
        exact, dtype = their_logits(folder), torch.bfloat16
        ours = (our_logits(folder, (0, 4), range(41), dtype, WeightFormat(kernels=True)) - exact).abs().mean()
        theirs = (their_logits(folder, dtype) - exact).abs().mean()
        assert 0 < ours <= 1.5 * theirs

    def test_are_packed_only_on_request(self, tmp_path: Path) -> None:
        config = read_config(folder := write_tiny_model(tmp_path, "llama", layers=1))
        assert isinstance(config, LlamaConfig)
        for kernels in (False, True):
            with Weights(folder, CPU, torch.float32, WeightFormat(kernels=kernels)) as weights:
                _, packed = llama_loader.load_layers(config, 0, 1, weights, llama.RotaryAngles(config, CPU))
                assert (packed is not None) is kernels

    def test_take_any_number_of_tokens_in_float32(self, tmp_path: Path) -> None:
        layers = CachedDecoder(tmp_path).layers
        assert all(layers.is_compiled(tokens) for tokens in (1, 16, 17, 1000))

    def test_run_all_layers_in_one_call_or_one_by_one_beside_adapters_of_two_routes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ranges: list[tuple[int, int]] = []
        run = compiled_layers.run_layers

        def record_range(*arguments: Any) -> None:
            ranges.append(arguments[2:4])
            run(*arguments)

        # Each thread calls it.
        torch.set_num_threads(1)
        cached = CachedDecoder(tmp_path)
        monkeypatch.setattr(compiled_layers, "run_layers", record_range)
        cached.run([(0, 30), (1, 5)])
        cached.run([(0, 30), (1, 5)], adapted=[(slice(1, 2), some_adapters())])
        assert ranges == 2 * [(1, 3)]
        cached.run([(0, 30), (1, 5)], adapted=[(slice(0, 1), some_adapters()), (slice(1, 2), some_adapters(1))])
        assert ranges[2:] == [(1, 2), (2, 3)]

    def test_compute_each_sequence_of_a_batch_over_its_own_context(self, tmp_path: Path) -> None:
        cached = CachedDecoder(tmp_path)
        together = cached.run([(0, 30), (1, 5), (2, 17)])
        for number, position in ((0, 30), (1, 5), (2, 17)):
            torch.testing.assert_close(together[number], cached.run([(number, position)])[0])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_state_makes_only_its_token_non_finite(self, tmp_path: Path, value: float) -> None:
        cached = CachedDecoder(tmp_path)
        cached.hidden[1, 5] = value
        after = cached.run([(0, 30), (1, 5)])
        assert bool(after[0].isfinite().all())
        assert not bool(after[1].isfinite().any())

    @pytest.mark.parametrize("adapted", [1, 2], ids=["of one route", "of two routes"])
    def test_add_adapters_beside_every_layer(self, tmp_path: Path, adapted: int) -> None:
        cached = CachedDecoder(tmp_path)
        singles = [(0, 30), (1, 5), (2, 17)]
        routes = [(slice(1 + number, 2 + number), some_adapters(number)) for number in range(adapted)]
        torch.testing.assert_close(cached.run(singles, routes), cached.run(singles, routes, compiled=False))
        assert not torch.allclose(cached.run(singles, routes)[1], cached.run(singles)[1])

    def test_add_the_same_beside_many_tokens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cached, routes = CachedDecoder(tmp_path), [(slice(0, 2), some_adapters())]
        few = cached.run([(0, 30), (1, 5)], routes)
        monkeypatch.setattr("stitch_server.model.decoder.MAX_ADAPTED_TOKENS", 1)
        torch.testing.assert_close(cached.run([(0, 30), (1, 5)], routes), few)

    @pytest.mark.parametrize("adapted", [1, 2], ids=["of one route", "of two routes"])
    def test_round_no_token_between_layers_for_the_adapters_of_others(self, tmp_path: Path, adapted: int) -> None:
        cached = CachedDecoder(tmp_path, torch.bfloat16)
        others = [(slice(1 + at, 2 + at), some_adapters(at).to(CPU, torch.bfloat16)) for at in range(adapted)]
        assert torch.equal(cached.run([(0, 30), (1, 5), (2, 17)], others)[0], cached.run([(0, 30)])[0])

    def test_leave_their_input_unchanged(self, tmp_path: Path) -> None:
        cached = CachedDecoder(tmp_path)
        before = cached.hidden.clone()
        cached.run([(0, 30), (1, 5)])
        assert torch.equal(cached.hidden, before)


def some_adapters(seed: int = 0) -> Adapters:
    """Beside all layers of `CachedDecoder`, of a rank that fills no vector."""
    draw = torch.Generator().manual_seed(seed)
    return Adapters(0, torch.randn(4, 3, 32, generator=draw), torch.randn(4, 32, 3, generator=draw))


class CachedDecoder:
    """Four layers packed for the kernels, and three sequences in a cache with more layers than are run."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.layers = DecoderLayers.load(
            write_tiny_model(folder, "qwen2"), 0, 4, CPU, dtype, WeightFormat(kernels=True)
        )
        self.store = KVStore(0, 4, 9, self.layers.kv_heads, self.layers.head_dim, CPU, dtype)
        draw = torch.Generator().manual_seed(0)
        self.store.kv.normal_(generator=draw)
        self.hidden = torch.randn(3, 32, generator=draw).to(dtype)

    @torch.inference_mode()
    def run(self, singles: list[tuple[int, int]], adapted: Adapted = (), compiled: bool = True) -> torch.Tensor:
        """Returns the states after layers 1 and 2 of each sequence's token at a position."""
        attend = backend_for(self.store)([Span(at, 1, range(3 * number, 3 * number + 3)) for number, at in singles])
        rows = self.hidden[[number for number, _ in singles]]
        if compiled:
            assert attend.paged_kv is not None
            return self.layers.run_compiled(rows, attend.paged_kv, 1, 3, adapted)
        return self.layers.run(rows, self.layers.rotary(torch.tensor([at for _, at in singles])), attend, 1, 3, adapted)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_native_families_are_supported(tmp_path: Path, family: str) -> None:
    assert isinstance(read_config(write_tiny_model(tmp_path, family, layers=1)), LlamaConfig)


def test_variant_that_native_layers_lack_is_not_supported(tmp_path: Path) -> None:
    assert not isinstance(read_config(write_tiny_model(tmp_path, layers=1, hidden_act="gelu")), LlamaConfig)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_tiny_model(tmp_path, "qwen3")
    exact = their_logits(folder)
    ours = (our_logits(folder, (0, 4), WHOLE, dtype) - exact).abs().mean()
    theirs = (their_logits(folder, dtype) - exact).abs().mean()
    assert 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_layers_leave_their_input_unchanged(tmp_path: Path, family: str) -> None:
    layers = DecoderLayers.load(write_tiny_model(tmp_path, family), 0, 4, CPU, torch.float32)
    given = torch.randn(5, 32)
    before = given.clone()
    with torch.inference_mode():
        layers.run(given, layers.rotary(torch.arange(5)), ReferenceAttention(), 0, 4)
    assert torch.equal(given, before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_leading_rotations_belong_to_leading_tokens(tmp_path: Path, family: str) -> None:
    layers = DecoderLayers.load(write_tiny_model(tmp_path, family), 0, 1, CPU, torch.float32)
    whole = layers.rotary(torch.tensor([4, 9, 2]))
    for angles, leading in zip(whole, layers.rotary(torch.tensor([4, 9])), strict=True):
        assert torch.equal(angles[:2], leading)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_gradients_reach_the_input(tmp_path: Path, family: str) -> None:
    layers = DecoderLayers.load(write_tiny_model(tmp_path, family), 1, 3, CPU, torch.float32)
    rotary = layers.rotary(torch.arange(6))
    hidden = torch.randn(6, 32, requires_grad=True)
    direction = torch.randn(6, 32)

    def through(states: torch.Tensor) -> torch.Tensor:
        return layers.run(states, rotary, ReferenceAttention(), 1, 3).sum()

    through(hidden).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    with torch.no_grad():
        slope = (through(hidden + 1e-3 * direction) - through(hidden - 1e-3 * direction)) / 2e-3
    assert float((hidden.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02, abs=0.02)


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_load_refuses_a_range_that_the_model_lacks(tmp_path: Path, first: int, end: int) -> None:
    with pytest.raises(Incompatible, match=f"layers {first} to {end} are no range of .*: it has 4"):
        DecoderLayers.load(write_tiny_model(tmp_path), first, end, CPU, torch.float32)


def test_load_refuses_an_unknown_family(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "gemma2")
    with pytest.raises(Incompatible, match="model_type is 'gemma2', which is none of arcee, "):
        DecoderLayers.load(folder, 0, 1, CPU, torch.float32)


def test_load_refuses_rope_that_depends_on_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = write_tiny_model(tmp_path, "olmo2", rope_parameters=rope)
    with pytest.raises(Incompatible, match=r"rope_parameters\.rope_type is 'dynamic', which is none of those whose"):
        DecoderLayers.load(folder, 0, 1, CPU, torch.float32)


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.05), ("int4", 0.25)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_quantized_layers_come_close(tmp_path: Path, family: str, quantization: Quantization, most: float) -> None:
    folder = write_tiny_model(tmp_path, family)
    hidden = torch.randn(6, DecoderLayers.load(folder, 0, 1, CPU, torch.float32).hidden_size)
    exact, rough = (
        layers.run(hidden, layers.rotary(torch.arange(6)), ReferenceAttention(), 0, 4)
        for layers in (
            DecoderLayers.load(folder, 0, 4, CPU, torch.float32),
            DecoderLayers.load(folder, 0, 4, CPU, torch.float32, WeightFormat(quantization)),
        )
    )
    # Over 200 draws it is 0.013 to 0.039 with int8.
    assert 0 < float((rough - exact).norm() / exact.norm()) < most


def test_load_refuses_to_quantize_a_family_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="layers of olmo2 with hidden_act silu can't be quantized to int8"):
        DecoderLayers.load(write_tiny_model(tmp_path, "olmo2"), 0, 1, CPU, torch.float32, WeightFormat("int8"))
