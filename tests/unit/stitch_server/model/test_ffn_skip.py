"""Gates leave out the FFNs of the tokens that they open for, and a file of gates is refused where it doesn't fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stitch.errors import Incompatible
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.ffn_skip import METADATA_KEY, FfnGates
from tests.support.reference_attention import ReferenceAttention
from tests.support.tiny_gates import RANK, THRESHOLDS, write_random_gates
from tests.support.tiny_model import write_tiny_model
from tests.support.whole_model import CPU

LAYERS, HIDDEN, TOKENS = 5, 32, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    return write_random_gates(model / "gates.safetensors", model)


def test_gates_and_bottlenecks_compute_their_formula(file: Path) -> None:
    gates, normed = FfnGates.load(file), torch.randn(TOKENS, HIDDEN)
    for share, threshold in THRESHOLDS.items():
        opens = normed @ gates.gate[1] + gates.bias[1] > threshold
        assert torch.equal(gates.at(share).opens(2, normed), opens)


def test_gate_of_a_token_is_the_same_in_every_batch(file: Path) -> None:
    skip, normed = FfnGates.load(file).at(0.5), torch.randn(200, HIDDEN)
    alone = torch.cat([skip.opens(1, row[None]) for row in normed])
    assert torch.equal(skip.opens(1, normed), alone)


@pytest.mark.parametrize("share", THRESHOLDS)
def test_only_the_given_rows_leave_out_what_their_gates_say(model: Path, file: Path, share: float) -> None:
    layers, skip = DecoderLayers.load(model, 0, LAYERS, CPU, torch.float32), FfnGates.load(file).at(share)
    hidden, rotary, rows = torch.randn(TOKENS, HIDDEN), layers.rotary(torch.arange(TOKENS)), torch.tensor([1, 4, 5, 8])
    before, layer = hidden.clone(), layers.layer(2)
    found = layers.run(hidden, rotary, ReferenceAttention(), 2, 3, (), [(rows, skip)])
    state = layer.add_attention(hidden, rotary, ReferenceAttention())  # type: ignore[attr-defined]
    opens = torch.zeros(TOKENS, dtype=torch.bool)
    opens[rows] = skip.opens(2, layer.normalize(state)[rows])  # type: ignore[attr-defined]
    expected = layers.run(hidden, rotary, ReferenceAttention(), 2, 3)
    expected[opens] = (state + skip.healing(2, state))[opens]
    torch.testing.assert_close(found, expected)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_first_and_last_layer_are_spared(model: Path, file: Path, layer: int) -> None:
    layers, skip = DecoderLayers.load(model, 0, LAYERS, CPU, torch.float32), FfnGates.load(file).at(0.9)
    hidden, rotary = torch.randn(TOKENS, HIDDEN), layers.rotary(torch.arange(TOKENS))
    skipping = [(torch.arange(TOKENS), skip)]
    found = layers.run(hidden, rotary, ReferenceAttention(), layer, layer + 1, (), skipping)
    assert torch.equal(found, layers.run(hidden, rotary, ReferenceAttention(), layer, layer + 1))


@pytest.mark.parametrize(("wanted", "found"), [((0, 9), (1, 4)), ((2, 3), (2, 3)), ((0, 1), (1, 1)), ((4, 9), (4, 4))])
def test_between_returns_the_gates_of_a_range(file: Path, wanted: tuple[int, int], found: tuple[int, int]) -> None:
    whole, normed = FfnGates.load(file).at(0.5), torch.randn(TOKENS, HIDDEN)
    part = whole.between(*wanted)
    assert (part.first, part.end, len(part.rates)) == (*found, found[1] - found[0])
    assert part.fingerprint == whole.fingerprint
    for layer in range(*found):
        assert torch.equal(part.opens(layer, normed), whole.opens(layer, normed))
        assert torch.equal(part.healing(layer, normed), whole.healing(layer, normed))


def test_saved_parameters_are_those_of_skipped_ffns_less_gates_and_bottlenecks(model: Path, file: Path) -> None:
    count, skip = ParameterCount.read(model), FfnGates.load(file).at(0.5)
    ffn = 3 * HIDDEN * 3 * HIDDEN
    assert count.feed_forward == (ffn,) * LAYERS
    assert skip.saved_parameters(count) == round(3 * 0.5 * (ffn - 2 * RANK * HIDDEN)) - 3 * HIDDEN


def test_file_gives_what_was_saved(file: Path, tmp_path: Path) -> None:
    gates = FfnGates.load(file)
    gates.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_fingerprint_differs_between_shares_and_gates(file: Path) -> None:
    gates = FfnGates.load(file)
    others = replace(gates, bias=gates.bias + 1), replace(gates, revision="other")
    found = {gates.at(share).fingerprint for share in THRESHOLDS} | {one.at(0.5).fingerprint for one in others}
    assert len(found) == len(THRESHOLDS) + 2


def test_gates_of_another_model_are_refused(model: Path, file: Path) -> None:
    described, gates = ModelDescription.read(model, "tiny"), FfnGates.load(file)
    gates.check_model(described)
    with pytest.raises(Incompatible, match=r"made for the model .* revision .*, not for tiny revision other$"):
        gates.check_model(replace(described, revision="other"))
    with pytest.raises(Incompatible, match=r"^3 gates of width 32 are not those of 9 layers$"):
        gates.check_model(replace(described, layers=9))


def test_share_without_calibration_is_refused(file: Path) -> None:
    with pytest.raises(Incompatible, match=r"not calibrated to the share 0.25, only to 0.1, 0.5, 0.9$"):
        FfnGates.load(file).at(0.25)


def test_tensors_that_do_not_fit_together_are_refused(file: Path) -> None:
    gates = FfnGates.load(file)
    for changed in (
        {"gate": gates.gate[1:]},
        {"bias": gates.bias.float() * float("nan")},
        {"healing": Adapters(1, gates.healing.down[1:], gates.healing.up[1:])},
    ):
        with pytest.raises(Incompatible):
            replace(gates, **changed)


@pytest.mark.parametrize("kind", ["missing", "no safetensors", "no metadata", "no list"])
def test_file_with_something_else_is_refused_by_its_name(file: Path, tmp_path: Path, kind: str) -> None:
    other, gates = tmp_path / "other.safetensors", FfnGates.load(file)
    tensors = {"gate": gates.gate, "bias": gates.bias}
    tensors |= {"healing.down": gates.healing.down, "healing.up": gates.healing.up}
    if kind == "no safetensors":
        other.write_bytes(b"gates")
    elif kind == "no metadata":
        save_file(tensors, other, {"other": "{}"})
    elif kind == "no list":
        save_file(tensors, other, {METADATA_KEY: json.dumps({"calibrations": []})})
    with pytest.raises(Incompatible, match=r"other\.safetensors has no gates of FFNs"):
        FfnGates.load(other)
