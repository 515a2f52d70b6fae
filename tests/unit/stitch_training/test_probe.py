"""The probe: its features, its regression, and the verbs that train and calibrate it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from router_gateway.requests.preparer import tokenize
from router_gateway.tokenization.chat_template import Turn
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch import tokenizer_files
from stitch.cluster import load_cluster
from stitch.errors import Incompatible, InvalidRequest
from stitch.sampling import Sampling
from stitch.thresholds import read_thresholds
from stitch_server.build import load_stage
from stitch_server.engine.types import Batch, LayerRange, Segment, Session
from stitch_server.model.probe import Probe, pool
from stitch_server.worker.model_runner import ModelRunner
from stitch_training import probe
from stitch_training.cli import build_parser
from stitch_training.probe import PENALTIES, FeatureExtractor, chat_encoder, fit_ridge, plain_encoder, routes_by_cost
from tests.support.in_process import ChainInProcess
from tests.support.runner_chain import CPU, new_runner
from tests.support.tiny_cluster import WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_probe import random_prompt


def write_labels(path: Path, rows: int = 80, **names: str) -> Path:
    """Writes prompts of two kinds of letters; the strong route is better on one of them."""
    drawn = random.Random(0)
    lines = []
    for _ in range(rows):
        hard = drawn.random() < 0.5
        text = "".join(drawn.choices("xyz" if hard else "abc", k=12))
        qualities = {names.get("weak", "weak"): 0.0 if hard else 1.0, names.get("strong", "strong"): 1.0}
        lines.append(json.dumps({"prompt": text, "routes": qualities}))
    path.write_text("\n".join(lines))
    return path


def call(*arguments: object) -> None:
    parsed = build_parser().parse_args([str(argument) for argument in arguments])
    parsed.call(parsed)


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    return write_tiny_cluster(tmp_path)


def test_probe_trained_from_labels_is_loaded_by_its_shard(
    cluster_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cluster_file.parent
    out, labels = folder / "probe.safetensors", write_labels(folder / "labels.jsonl")
    call("probe", cluster_file, "--data", labels, "--out", out, "--tokens", 10, "--budget", 0.3)
    probe, report = Probe.load(out, CPU), json.loads(out.with_suffix(".json").read_text())
    assert (probe.binding.layer, probe.binding.tokens, probe.binding.routes) == (3, 10, ("weak", "strong"))
    (ranked,) = report["unseen"]["labels"].values()
    # Letters differ, so even random layers separate them.
    assert ranked["router"]["apgr"]["value"] > 0.7 > ranked["prompt length"]["apgr"]["value"]
    assert report["probe"] == probe.fingerprint
    assert probe.training["data"][0]["rows"] == 80
    assert probe.training["shares"][1] == pytest.approx(0.3, abs=0.05)
    assert "weak → strong" in capsys.readouterr().out
    fields = json.loads(cluster_file.read_text())
    fields["gateway"]["probe"] = "probe.safetensors"
    cluster_file.write_text(json.dumps(fields))
    cluster = load_cluster(str(cluster_file))
    loaded = load_stage(cluster, cluster.shard("bottom-0"), CPU).probe
    assert loaded is not None
    assert loaded.fingerprint == probe.fingerprint
    assert load_stage(cluster, cluster.shard("top-0"), CPU).probe is None


def test_names_in_the_labels_are_renamed_to_routes(cluster_file: Path) -> None:
    folder = cluster_file.parent
    labels = write_labels(folder / "labels.jsonl", weak="small", strong="large")
    out = folder / "probe.safetensors"
    call("probe", cluster_file, "--data", labels, "--out", out, "--rename", "small=weak", "large=strong", "--tokens", 4)
    assert out.is_file()


def test_same_labels_give_the_same_probe_bytes(cluster_file: Path) -> None:
    folder = cluster_file.parent
    labels = write_labels(folder / "labels.jsonl")
    outs = [folder / "a.safetensors", folder / "b.safetensors"]
    for out in outs:
        call("probe", cluster_file, "--data", labels, "--out", out, "--tokens", 6, "--chat")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert Probe.load(outs[0], CPU).training["chat"] is True


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--tokens", 0], "tokens"),
        (["--tokens", 4096], "tokens"),
        (["--folds", 1], "folds"),
        (["--budget", 2], "budget"),
        (["--rename", "weak"], "rename"),
    ],
)
def test_probe_flag_out_of_range_is_refused_by_name(flags: list[Any], field: str, cluster_file: Path) -> None:
    labels = write_labels(cluster_file.parent / "labels.jsonl")
    with pytest.raises(InvalidRequest, match=f"^{field} "):
        call("probe", cluster_file, "--data", labels, "--out", cluster_file.parent / "p.safetensors", *flags)


def test_routes_by_cost_are_cheapest_first(cluster_file: Path) -> None:
    assert routes_by_cost(load_cluster(str(cluster_file))) == ("weak", "strong")


def test_probe_for_a_route_without_bottom_layers_is_refused(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path, bottoms=[WHOLE_BOTTOM], tops=[WHOLE_TOP], with_ends=True)
    assert routes_by_cost(load_cluster(str(file))) == ("small", "weak", "strong", "whole")
    labels = write_labels(tmp_path / "labels.jsonl")
    with pytest.raises(InvalidRequest, match="routes is 'small', but it has no bottom layers"):
        call("probe", file, "--data", labels, "--out", tmp_path / "p.safetensors")


class TestProbeCalibration:
    @pytest.fixture
    def trained(self, cluster_file: Path) -> Path:
        labels, out = write_labels(cluster_file.parent / "labels.jsonl"), cluster_file.parent / "probe.safetensors"
        call("probe", cluster_file, "--data", labels, "--out", out, "--tokens", 10)
        return cluster_file

    @staticmethod
    def calibrated(cluster_file: Path, budget: float) -> Path:
        folder, out = cluster_file.parent, cluster_file.parent / "thresholds.json"
        given = ["--cluster", cluster_file, "--probe", folder / "probe.safetensors", "--data", folder / "labels.jsonl"]
        call("calibrate", *given, "--budget", budget, "--out", out)
        return out

    def test_calibrated_thresholds_keep_the_budget_and_are_read_by_the_shard(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        thresholds = self.calibrated(trained, 0.25)
        assert "strong 25.0%" in capsys.readouterr().err
        fields = json.loads(trained.read_text())
        fields["gateway"] |= {"probe": "probe.safetensors", "probe_thresholds": thresholds.name}
        trained.write_text(json.dumps(fields))
        chain = ChainInProcess(load_cluster(str(trained)))
        runner = chain.shards["bottom-0"].engine._runner
        assert isinstance(runner, ModelRunner)
        assert runner.probe is not None
        decision = runner.probe.decide(torch.randn(10, 48), ("weak", "strong"))
        assert decision.thresholds == read_thresholds(thresholds).thresholds

    def test_thresholds_of_another_probe_are_refused(self, trained: Path) -> None:
        thresholds = self.calibrated(trained, 0.25)
        named = json.loads(thresholds.read_text()) | {"router": "another"}
        thresholds.write_text(json.dumps(named))
        fields = json.loads(trained.read_text())
        fields["gateway"] |= {"probe": "probe.safetensors", "probe_thresholds": thresholds.name}
        trained.write_text(json.dumps(fields))
        with pytest.raises(InvalidRequest, match="another"):
            ChainInProcess(load_cluster(str(trained)))

    def test_budget_out_of_range_is_refused(self, trained: Path) -> None:
        with pytest.raises(InvalidRequest, match=r"^budget "):
            self.calibrated(trained, 1.5)


LAYER = 3
TEXTS = ["stitch", "Wo liegt das?", "日本語 🙂", " two  spaces\n"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def ignore(done: int, total: int) -> None:
    pass


def test_features_are_those_of_a_shard(model_folder: Path) -> None:
    from stitch_server.model.embedding_and_head import Embedding

    extractor = FeatureExtractor.load(model_folder, LAYER, 20, torch.float32, is_chat=False)
    prompts = [random_prompt(seed, tokens) for seed, tokens in enumerate((1, 7, 20, 33, 7, 21))]
    rows = extractor.from_tokens(prompts, ignore)
    runner = new_runner(model_folder, 0, LAYER, embed=Embedding.load(model_folder, CPU, torch.float32))
    for row, prompt in zip(rows, prompts, strict=True):
        session = Session("weak", (), Sampling(), prompt, len(prompt))
        segment = Segment(session, LayerRange(0, LAYER), 0, len(prompt), True, range(4))
        states = runner.run(Batch((segment,))).hidden
        assert np.allclose(row, pool(states[:20]).numpy(), atol=1e-5)


def test_feature_extraction_reports_progress_to_the_end(model_folder: Path) -> None:
    extractor = FeatureExtractor.load(model_folder, 1, 8, torch.float32, is_chat=False)
    calls: list[tuple[int, int]] = []
    extractor.from_texts(TEXTS, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(TEXTS), len(TEXTS))


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_tokenized_as_by_the_gateway(model_folder: Path, text: str) -> None:
    files = {
        name: (model_folder / name).read_bytes() for name in tokenizer_files.NAMES if (model_folder / name).is_file()
    }
    vocabulary = Vocabulary.from_files(files)
    assert plain_encoder(model_folder)(text) == tokenize(text, vocabulary, context_tokens=4_096)
    assert chat_encoder(model_folder)(text) == tokenize((Turn("user", text),), vocabulary, context_tokens=4_096)


def test_empty_prompt_is_refused_by_its_number(model_folder: Path) -> None:
    extractor = FeatureExtractor.load(model_folder, 1, 8, torch.float32, is_chat=False)
    with pytest.raises(InvalidRequest, match="prompt 2"):
        extractor.from_tokens([[1], []], ignore)


def test_chat_encoder_without_a_template_is_refused(model_folder: Path, tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare", layers=1)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(Incompatible, match="no chat template"):
        chat_encoder(bare)


def test_ridge_recovers_a_linear_relation() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 5)) * [1.0, 10.0, 0.1, 1.0, 1.0] + 3
    targets = features @ generator.standard_normal((5, 2)) + [1.0, -2.0]
    fitted = fit_ridge(features, targets)
    assert fitted.penalty == min(PENALTIES)
    assert np.abs(fitted.predict(features) - targets).max() < 0.01 * targets.std()


def test_ridge_shrinks_noise() -> None:
    generator = np.random.default_rng(1)
    features, targets = generator.standard_normal((60, 40)), generator.standard_normal((60, 1))
    fitted = fit_ridge(features, targets)
    assert fitted.penalty > 1
    assert fitted.predict(features).std() < 0.5 * targets.std()


def test_constant_feature_gets_no_weight() -> None:
    generator = np.random.default_rng(2)
    features = np.hstack([generator.standard_normal((50, 2)), np.full((50, 1), 7.0)])
    fitted = fit_ridge(features, features[:, :1])
    assert fitted.weights[2, 0] == 0
    assert np.isfinite(fitted.weights).all()


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_leave_one_out_error_equals_refitting(penalty: float) -> None:
    generator = np.random.default_rng(3)
    features = generator.standard_normal((12, 3))
    # The shortcut keeps the means of all rows; rows in pairs of opposites have means of zero.
    features = np.vstack([features, -features])
    targets = np.vstack([generator.standard_normal((12, 1)), generator.standard_normal((12, 1))])
    targets -= targets.mean()
    scale = features.std(axis=0)
    standard = features / scale
    gram = standard.T @ standard
    errors = []
    for row in range(24):
        kept = np.arange(24) != row
        # Unpenalized mean, penalized weights, without this row.
        design = np.hstack([np.ones((23, 1)), standard[kept]])
        penalties = np.diag([0.0, *([penalty * 24] * 3)])
        solved = np.linalg.solve(design.T @ design + penalties, design.T @ targets[kept])
        errors.append(float((targets[row] - [1.0, *standard[row]] @ solved)[0]) ** 2)
    variances, axes = np.linalg.eigh(gram)
    rotated = standard @ axes
    found = probe._leave_one_out_error(rotated, variances, rotated.T @ targets, targets, penalty)
    assert found == pytest.approx(np.mean(errors))
