"""Gates learn which FFNs can be left out, hold their share, and are evaluated as they are served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitch.cluster import FfnSkipConfig, RouteConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch_server.model.ffn_skip import FfnGates
from stitch_training.cli import main
from stitch_training.data import DataSettings, Role
from stitch_training.evaluate import skipping_system
from stitch_training.ffn_skip import SkipSettings, fit_gates
from stitch_training.generation import generate_greedy
from stitch_training.models import load_pair
from stitch_training.scoring import PROMPT_TOKENS, generated_tokens, text_scores, whole
from tests.support.tiny_fit import write_chats, write_cluster, write_texts
from tests.support.tiny_model import TOKENS, write_tiny_model

SEQUENCE_TOKENS = 64


def quiet(task: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SkipSettings:
    folder = tmp_path_factory.mktemp("gates")
    write_tiny_model(folder / "bottom", "qwen2", layers=6, hidden_size=48, heads=6)
    write_tiny_model(folder / "top", "llama", layers=2, seed=1)
    file = write_cluster(folder)
    file.write_text(file.read_text().replace("layers = [0, 3]", "layers = [0, 6]"))
    data = DataSettings((write_texts(folder / "texts.jsonl"),), 1024, 512, SEQUENCE_TOKENS)
    return SkipSettings(load_cluster(str(file)), "bottom", data, "float32", folder / "run", (0.2, 0.4), rank=2)


@pytest.fixture(scope="module")
def file(settings: SkipSettings) -> Path:
    file = settings.run_dir.parent / "gates.safetensors"
    fit_gates(settings, quiet).gates.save(file)
    return file


def route_of(file: Path, share: float) -> RouteConfig:
    return RouteConfig(name="skipping", bottom_layers=6, ffn_skip=FfnSkipConfig(file=file.name, share=share))


def test_calibrated_shares_hold_on_the_held_out_pass(file: Path) -> None:
    gates = FfnGates.load(file)
    for share, calibration in gates.calibrations.items():
        assert len(calibration.rates) == 4
        assert sum(calibration.rates) / 6 == pytest.approx(share, abs=0.05)


def test_calibrated_shares_hold_in_bfloat16(settings: SkipSettings, tmp_path: Path) -> None:
    gates = fit_gates(replace(settings, dtype="bfloat16", run_dir=tmp_path / "run"), quiet).gates
    for share, calibration in gates.calibrations.items():
        assert sum(calibration.rates) / 6 == pytest.approx(share, abs=0.05)


def test_gates_leave_out_the_ffns_that_do_nothing(settings: SkipSettings, tmp_path: Path) -> None:
    silent = {2, 4}
    folder = write_tiny_model(tmp_path / "bottom", "qwen2", layers=6, hidden_size=48, heads=6)
    weights = load_file(folder / "model.safetensors")
    for layer in silent:
        weights[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_tiny_model(tmp_path / "top", "llama", layers=2, seed=1)
    file = write_cluster(tmp_path)
    file.write_text(file.read_text().replace("layers = [0, 3]", "layers = [0, 6]"))
    cluster = load_cluster(str(file))
    gates = fit_gates(replace(settings, cluster=cluster, run_dir=tmp_path / "run", shares=(2 / 6,)), quiet).gates
    rates = gates.calibrations[2 / 6].rates
    assert {layer for layer, rate in enumerate(rates, 1) if rate > 0.5} == silent
    assert sum(rates) == pytest.approx(2, abs=0.3)


def test_only_generated_tokens_skip(settings: SkipSettings, file: Path) -> None:
    loaded = load_pair(settings.cluster, torch.float32)
    system = skipping_system(loaded, settings.cluster, route_of(file, 0.4))
    tokens = torch.randint(TOKENS, (2, SEQUENCE_TOKENS), generator=torch.Generator().manual_seed(2))
    none, late = torch.zeros_like(tokens, dtype=torch.bool), torch.arange(SEQUENCE_TOKENS).expand_as(tokens) >= 40
    exact = text_scores(whole(loaded.pair.bottom), tokens).losses
    torch.testing.assert_close(text_scores(system.pipeline, tokens, none).losses, exact)
    skipped = text_scores(system.pipeline, tokens, late).losses
    torch.testing.assert_close(skipped[:, :40], exact[:, :40])
    assert not torch.allclose(skipped[:, 40:], exact[:, 40:])
    assert system.parameters < skipping_system(loaded, settings.cluster, route_of(file, 0.2)).parameters


def test_generated_answers_are_those_of_one_pass(settings: SkipSettings, file: Path) -> None:
    loaded = load_pair(settings.cluster, torch.float32)
    pipeline = skipping_system(loaded, settings.cluster, route_of(file, 0.4)).pipeline
    prompts = [[5, 9, 200, 31], [7, 8]]
    for prompt, answer in zip(prompts, generate_greedy(pipeline, prompts, TOKENS, 12, ()), strict=True):
        tokens = torch.tensor([[*prompt, *answer]])
        states = pipeline.states(tokens, torch.arange(tokens.shape[1])[None] >= len(prompt))
        likeliest = pipeline.head.logits(states[0])[:, :TOKENS].argmax(1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == answer


def test_answers_and_late_text_count_as_generated() -> None:
    roles = torch.tensor([[Role.PLAIN] * (PROMPT_TOKENS + 1), [Role.USER, *[Role.ASSISTANT] * PROMPT_TOKENS]])
    assert generated_tokens(roles).tolist() == [[False] * PROMPT_TOKENS + [True], [False] + [True] * PROMPT_TOKENS]


def test_share_outside_of_its_range_is_refused(settings: SkipSettings) -> None:
    with pytest.raises(InvalidRequest, match=r"^shares is \(1.5,\), but each must be over 0 and below 1$"):
        fit_gates(replace(settings, shares=(1.5,)), quiet)


def test_program_makes_gates_and_evaluates_their_route(settings: SkipSettings, tmp_path: Path) -> None:
    cluster, data = settings.cluster.file, settings.data.files[0]
    gates, out, text = tmp_path / "made.safetensors", tmp_path / "quality.json", ["--sequence-tokens", "64"]
    shared = [str(cluster), "--data", str(data), "--held-out-tokens", "256", *text]
    assert main(["gates", *shared, "--tokens", "512", "--skip-shares", "0.4", "--out", str(gates)]) == 0
    route = f'[[routes]]\nname = "skipping"\nbottom_layers = 6\nffn_skip = {{ file = "{gates}", share = 0.4 }}\n'
    given = settings.cluster.folder / "cluster.toml"
    stitched, routes = tmp_path / "cluster.toml", given.read_text().split("[[routes]]")
    stitched.write_text(routes[0] + route + routes[1][routes[1].index("[[shards]]") :])
    assert main(["evaluate", str(stitched), *shared[1:], "--prompts", str(write_chats(tmp_path / "chats.jsonl")),
                 "--prompt-rows", "2", "--prompt-tokens", "8", "--out", str(out)]) == 0  # fmt: skip
    systems = {row["name"]: row for row in json.loads(out.read_text())["systems"]}
    whole_model, skipping = systems["bottom alone"], systems["skipping"]
    assert skipping["parameters"] < whole_model["parameters"]
    assert skipping["losses"]["content"]["mean"] != whole_model["losses"]["content"]["mean"]
    assert 0 < skipping["figures"]["agreement"]["mean"] <= 1
