"""A stitch maps hidden states as its file specifies, and refuses models and files that it was not made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stitch.errors import Incompatible
from stitch.v1 import inference_pb2
from stitch_server.model.adapters import Adapters
from stitch_server.model.stitch import Stitch, StitchBinding
from tests.support.whole_model import CPU

BINDING = StitchBinding(
    bottom_id="big",
    bottom_revision="b" * 16,
    bottom_hidden=6,
    bottom_layers=3,
    top_id="small",
    top_revision="c" * 16,
    top_hidden=4,
    top_from=2,
    tokenizer="d" * 64,
)
MAKING = {"method": "least squares", "tokens": 1000, "loss_after": 1.5}


def some_stitch(dtype: torch.dtype = torch.float32) -> Stitch:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    return Stitch(weight.to(dtype), bias.to(dtype), BINDING, MAKING)


def adapted_stitch() -> Stitch:
    """With adapters of rank 2 beside the three layers from 2 on."""
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 4, 2, generator=generator)
    return Stitch(some_stitch().weight, some_stitch().bias, BINDING, MAKING, adapters=Adapters(2, down, up))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    some_stitch().save(tmp_path / "made" / "stitch.safetensors")
    return tmp_path / "made" / "stitch.safetensors"


def test_stitch_maps_hidden_states() -> None:
    stitch, hidden = some_stitch(), torch.randn(5, 6)
    torch.testing.assert_close(stitch(hidden), hidden @ stitch.weight.T + stitch.bias)


def test_stitch_maps_hidden_states_of_another_dtype() -> None:
    assert some_stitch()(torch.randn(5, 6, dtype=torch.bfloat16)).dtype == torch.float32


def test_load_returns_what_save_wrote(file: Path) -> None:
    loaded, made = Stitch.load(file, CPU, torch.float32), some_stitch()
    assert torch.equal(loaded.weight, made.weight)
    assert torch.equal(loaded.bias, made.bias)
    assert (loaded.binding, loaded.making, loaded.fingerprint) == (BINDING, MAKING, made.fingerprint)


def test_load_returns_the_adapters_that_save_wrote(tmp_path: Path) -> None:
    made = adapted_stitch()
    made.save(tmp_path / "adapted.safetensors")
    loaded = Stitch.load(tmp_path / "adapted.safetensors", CPU, torch.float64)
    assert made.adapters is not None
    assert loaded.adapters is not None
    assert loaded.adapters.first == 2
    assert torch.equal(loaded.adapters.down, made.adapters.down.double())
    assert torch.equal(loaded.adapters.up, made.adapters.up.double())
    assert loaded.fingerprint == made.fingerprint


def test_first_tokens_get_the_stored_state(tmp_path: Path) -> None:
    made = Stitch(some_stitch().weight, some_stitch().bias, BINDING, MAKING, first=torch.arange(4.0))
    made.save(tmp_path / "first.safetensors")
    loaded, hidden = Stitch.load(tmp_path / "first.safetensors", CPU, torch.float32), torch.randn(5, 6)
    expected = some_stitch()(hidden)
    assert torch.equal(loaded(hidden), expected)
    expected[[0, 3]] = torch.arange(4.0)
    assert torch.equal(loaded(hidden, [0, 3]), expected)
    assert loaded.fingerprint == made.fingerprint != some_stitch().fingerprint


def test_first_tokens_are_mapped_without_a_stored_state() -> None:
    hidden = torch.randn(5, 6)
    assert torch.equal(some_stitch()(hidden, [0, 3]), some_stitch()(hidden))


def test_saved_file_has_default_permissions(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_save_writes_the_same_bytes_for_the_same_stitch(file: Path, tmp_path: Path) -> None:
    some_stitch().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_loads_under_inference_mode(file: Path) -> None:
    with torch.inference_mode():
        assert Stitch.load(file, CPU, torch.float32)(torch.zeros(1, 6)).shape == (1, 4)


class TestFingerprint:
    def test_does_not_depend_on_the_loaded_dtype(self, file: Path) -> None:
        computing = Stitch.load(file, CPU, torch.bfloat16)
        assert computing.weight.dtype == torch.bfloat16
        assert computing.fingerprint == some_stitch().fingerprint

    def test_changes_with_a_value(self) -> None:
        stitch = some_stitch()
        changed = stitch.weight.clone()
        changed[0, 0] += 1e-3
        assert Stitch(changed, stitch.bias, BINDING).fingerprint != stitch.fingerprint

    def test_changes_with_the_binding_but_not_with_the_making(self) -> None:
        stitch = some_stitch()
        elsewhere = replace(BINDING, top_from=1)
        assert Stitch(stitch.weight, stitch.bias, elsewhere).fingerprint != stitch.fingerprint
        assert Stitch(stitch.weight, stitch.bias, BINDING, {"method": "x"}).fingerprint == stitch.fingerprint

    def test_changes_with_the_adapters(self) -> None:
        made = adapted_stitch()
        assert made.adapters is not None
        changed = made.adapters.up.clone()
        changed[2, 0, 1] += 1e-3
        other = Stitch(made.weight, made.bias, BINDING, adapters=replace(made.adapters, up=changed))
        assert len({some_stitch().fingerprint, made.fingerprint, other.fingerprint}) == 3

    def test_changes_with_the_stored_dtype(self) -> None:
        assert some_stitch(torch.bfloat16).fingerprint != some_stitch().fingerprint


class TestRefusals:
    def test_other_bottom_model_is_refused(self) -> None:
        other = inference_pb2.Model(id="huge", revision="e" * 16)
        made_for = f"made for the bottom model big revision {'b' * 16}, not for huge revision {'e' * 16}"
        with pytest.raises(Incompatible, match=f"the stitch from layer 3 to 2 is {made_for}"):
            some_stitch().check_models(bottom=other)

    def test_other_top_model_is_refused(self) -> None:
        same, other = (inference_pb2.Model(id="small", revision=letter * 16) for letter in "bf")
        with pytest.raises(
            Incompatible, match=f"top model small revision {'c' * 16}, not for small revision {'f' * 16}"
        ):
            some_stitch().check_models(bottom=same, top=other)

    def test_same_weights_under_another_id_are_accepted(self) -> None:
        renamed = inference_pb2.Model(id="/models/big", revision="b" * 16)
        some_stitch().check_models(bottom=renamed, top=inference_pb2.Model(id="x", revision="c" * 16))

    @pytest.mark.parametrize("cut", [(2, 2), (3, 1)])
    def test_other_cut_is_refused(self, cut: tuple[int, int]) -> None:
        some_stitch().check_cut(3, 2)
        with pytest.raises(Incompatible, match=f"from layer 3 to 2 can't serve a cut from layer {cut[0]} to {cut[1]}"):
            some_stitch().check_cut(*cut)

    def test_other_tokenizer_is_refused(self) -> None:
        some_stitch().check_tokenizer("d" * 64)
        with pytest.raises(Incompatible, match=f"is for tokenizer {'d' * 16}, not for {'0' * 16}$"):
            some_stitch().check_tokenizer("0" * 64)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("tensor", ["weight", "bias"])
    def test_non_finite_values_are_refused(self, file: Path, tensor: str, value: float) -> None:
        tensors = {"weight": some_stitch().weight, "bias": some_stitch().bias}
        tensors[tensor].view(-1)[2] = value
        with pytest.raises(Incompatible, match="from layer 3 to 2 has non-finite values"):
            Stitch(tensors["weight"], tensors["bias"], BINDING)

    def test_first_token_of_another_width_is_refused(self) -> None:
        with pytest.raises(Incompatible, match=r"a stitch to 4 values has a first token of \(5,\)"):
            Stitch(some_stitch().weight, some_stitch().bias, BINDING, first=torch.zeros(5))

    @pytest.mark.parametrize("part", ["down", "up"])
    def test_non_finite_adapters_are_refused(self, part: str) -> None:
        made = adapted_stitch()
        assert made.adapters is not None
        getattr(made.adapters, part).view(-1)[3] = float("nan")
        with pytest.raises(Incompatible, match="from layer 3 to 2 has non-finite values"):
            Stitch(made.weight, made.bias, BINDING, adapters=made.adapters)

    @pytest.mark.parametrize(("first", "width"), [(1, 4), (2, 5)])
    def test_adapters_of_another_layer_or_width_are_refused(self, first: int, width: int) -> None:
        adapters = Adapters(first, torch.zeros(3, 2, width), torch.zeros(3, width, 2))
        refusal = f"from layer 3 to 2 of 4 values has adapters from layer {first} with {width} values"
        with pytest.raises(Incompatible, match=refusal):
            Stitch(some_stitch().weight, some_stitch().bias, BINDING, adapters=adapters)

    def test_adapters_of_another_depth_are_refused(self) -> None:
        some_stitch().check_depth(7)
        adapted_stitch().check_depth(5)
        with pytest.raises(Incompatible, match="has adapters up to layer 4, and the top model's last one is 5"):
            adapted_stitch().check_depth(6)

    def test_file_with_half_of_the_adapters_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "half.safetensors"
        adapted_stitch().save(file)
        with safe_open(file, "pt") as stored:
            kept = {name: stored.get_tensor(name) for name in ("weight", "bias", "adapters.down")}
            save_file(kept, file, stored.metadata())
        with pytest.raises(Incompatible, match=r"half\.safetensors is no stitch: .*adapters\.up"):
            Stitch.load(file, CPU, torch.float32)

    @pytest.mark.parametrize(("weight", "bias"), [((4, 5), 4), ((6, 4), 4), ((4, 6), 6)])
    def test_other_shape_is_refused(self, weight: tuple[int, int], bias: int) -> None:
        with pytest.raises(Incompatible, match=rf"weight \({weight[0]}, {weight[1]}\) and .* can't map 6 to 4"):
            Stitch(torch.zeros(weight), torch.zeros(bias), BINDING)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated_file_is_refused(self, file: Path, kept: int) -> None:
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(Incompatible, match=r"stitch\.safetensors is no stitch: "):
            Stitch.load(file, CPU, torch.float32)

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Incompatible, match=r"none\.safetensors is no stitch: "):
            Stitch.load(tmp_path / "none.safetensors", CPU, torch.float32)

    @pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"stitch": "{"}, {"stitch": "{}"}, {"stitch": "[]"}])
    def test_file_of_another_kind_is_refused(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        file = tmp_path / "other.safetensors"
        save_file({"weight": torch.zeros(4, 6), "bias": torch.zeros(4)}, file, metadata)
        with pytest.raises(Incompatible, match=r"other\.safetensors is no stitch: "):
            Stitch.load(file, CPU, torch.float32)

    def test_file_without_a_tensor_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "half.safetensors"
        save_file({"weight": torch.zeros(4, 6)}, file, {"stitch": "{}"})
        with pytest.raises(Incompatible, match=r"half\.safetensors is no stitch: .*bias"):
            Stitch.load(file, CPU, torch.float32)

    def test_file_whose_tensors_contradict_its_metadata_is_refused(self, file: Path) -> None:
        made = some_stitch()
        narrow = Stitch(made.weight[:, :5], made.bias, replace(BINDING, bottom_hidden=5))
        object.__setattr__(narrow, "binding", BINDING)
        narrow.save(file)
        with pytest.raises(Incompatible, match=r"stitch\.safetensors: a stitch with weight \(4, 5\)"):
            Stitch.load(file, CPU, torch.float32)
