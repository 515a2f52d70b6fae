"""A probe predicts gains by its file's numbers, and a file that does not fit is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription
from stitch_server.model.probe import MAX_PROBE_TOKENS, METADATA_KEY, Probe, ProbeBinding, pool

WIDTH = 4
CPU = torch.device("cpu")
BINDING = ProbeBinding("id", "revision", WIDTH, 3, 8, ("weak", "middle", "strong"), "f" * 64)
BOTTOM = ModelDescription("elsewhere", "revision", "llama", 5, WIDTH, 99, 128, 2, 1, 2)


def new_probe(**fields: Any) -> Probe:
    given: dict[str, Any] = {
        "weight": torch.arange(8.0).view(2, WIDTH),
        "bias": torch.tensor([0.5, -0.5]),
        "binding": BINDING,
        "thresholds": (0.1, 0.2),
        "percentiles": tuple(step / 100 for step in range(101)),
        "training": {"data": [{"name": "made", "rows": 3}]},
    }
    return Probe(**(given | fields))


def test_load_returns_what_save_wrote(tmp_path: Path) -> None:
    probe, file = new_probe(), tmp_path / "folder" / "probe.safetensors"
    probe.save(file)
    loaded = Probe.load(file, CPU)
    assert (loaded.binding, loaded.thresholds, loaded.percentiles) == (BINDING, (0.1, 0.2), probe.percentiles)
    assert loaded.training == probe.training
    assert loaded.fingerprint == probe.fingerprint
    assert torch.equal(loaded.weight, probe.weight)


def test_fingerprint_changes_with_tensors_and_binding() -> None:
    others = [
        new_probe(bias=torch.tensor([0.5, -0.4])),
        new_probe(binding=replace(BINDING, layer=4)),
        new_probe(thresholds=(0.3, 0.4)),
    ]
    found = [other.fingerprint for other in others]
    assert found[0] != new_probe().fingerprint
    assert found[1] != new_probe().fingerprint
    # Thresholds are a matter of the budget: those of a calibration stand in a file of their own.
    assert found[2] == new_probe().fingerprint


class TestPooling:
    def test_pool_is_the_mean_direction_without_the_first(self) -> None:
        states = torch.tensor([[9.0, 9.0, 9.0, 9.0], [3.0, 0.0, 0.0, 0.0], [0.0, 500.0, 0.0, 0.0]])
        assert torch.allclose(pool(states), torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=1e-5)

    def test_pool_of_a_single_token_is_its_direction(self) -> None:
        assert torch.allclose(pool(torch.tensor([[0.0, 0.0, 7.0, 0.0]])), torch.tensor([0.0, 0.0, 2.0, 0.0]))

    def test_pool_computes_in_float32(self) -> None:
        states = torch.full((100, WIDTH), 300.0, dtype=torch.float16)
        assert pool(states).dtype == torch.float32
        assert torch.allclose(pool(states), torch.ones(WIDTH))

    def test_gain_of_the_cheapest_route_is_zero(self) -> None:
        states = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
        assert new_probe().gains(states) == pytest.approx((0.0, 6.5, 21.5), abs=1e-4)


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def damaged(file: Path, change: Change) -> Path:
    """Rewrites a probe's file in place."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("weight", "bias")}
        fields = json.loads(opened.metadata()[METADATA_KEY])
    change(tensors, fields)
    save_file(tensors, file, {METADATA_KEY: json.dumps(fields)})
    return file


DAMAGE: dict[str, tuple[Change, str]] = {
    "another format": (lambda _, fields: fields.update(format="stitch-text-router/1"), "its format is stitch-text"),
    "a value changed": (lambda tensors, _: tensors["bias"].add_(1), "its fingerprint is"),
    "non-finite": (lambda tensors, _: tensors["weight"].fill_(float("nan")), "non-finite"),
    "a threshold is not finite": (lambda _, fields: fields.update(thresholds=[float("nan"), 1]), "non-finite"),
    "another width": (lambda tensors, _: tensors.update(weight=torch.zeros(2, 3)), "the shapes"),
    "another dtype": (lambda tensors, _: tensors.update(weight=torch.zeros(2, 4, dtype=torch.half)), "not float32"),
    "no bias": (lambda tensors, _: tensors.pop("bias"), "bias"),
    "no thresholds": (lambda _, fields: fields.pop("thresholds"), "thresholds"),
    "a threshold too few": (lambda _, fields: fields.update(thresholds=[0.1]), "1 thresholds"),
    "thresholds that are no list": (lambda _, fields: fields.update(thresholds=7), "no probe"),
    "a binding with too much": (lambda _, fields: fields["binding"].update(colour="red"), "colour"),
    "no layer": (lambda _, fields: fields["binding"].update(layer=0), "a layer and a token"),
    "too many tokens": (
        lambda _, fields: fields["binding"].update(tokens=MAX_PROBE_TOKENS + 1),
        f"{MAX_PROBE_TOKENS} is the",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    new_probe().save(file)
    change, said = DAMAGE[damage]
    with pytest.raises(Incompatible, match=said):
        Probe.load(damaged(file, change), CPU)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_file_of_another_format_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Incompatible, match="is no probe"):
        Probe.load(file, CPU)


@pytest.mark.parametrize(
    ("bottom", "layer", "routes", "tokenizer", "said"),
    [
        (replace(BOTTOM, revision="other"), 3, BINDING.routes, BINDING.tokenizer, "revision revision, not for other"),
        (BOTTOM, 2, BINDING.routes, BINDING.tokenizer, "earliest cut after layer 3, not for 2"),
        (BOTTOM, 3, ("weak", "strong"), BINDING.tokenizer, "middle, strong, weak, not for strong, weak"),
        (BOTTOM, 3, BINDING.routes, "0" * 64, "tokenizer f{16}, not for 0{16}"),
    ],
)
def test_other_model_cut_or_routes_are_refused(
    bottom: ModelDescription, layer: int, routes: tuple[str, ...], tokenizer: str, said: str
) -> None:
    with pytest.raises(Incompatible, match=said):
        new_probe().check(bottom, layer, routes, tokenizer)


def test_same_weights_under_another_id_are_accepted() -> None:
    new_probe().check(BOTTOM, 3, tuple(reversed(BINDING.routes)), BINDING.tokenizer)
