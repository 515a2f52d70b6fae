"""Trains and calibrates the probe that decides routes within the first shard's prefill.

A prompt is tokenized as the gateway does it. Its first tokens run through the bottom's layers up to the earliest cut,
and the pooled states are its features. The gain of every costlier route is a ridge regression on these features.
Figures are of rows whose fold the regression was not trained on; the probe itself is fitted on all rows.

    weights = (XᵀX + λ)⁻¹ Xᵀy on standardized features

λ is the one of a grid with the lowest leave-one-out error, which needs no second fit: row i's is its residual ÷
(1 - hᵢ), with h the diagonal of the hat matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stitch.cluster import ClusterConfig
from stitch.environment import cache_folder
from stitch.errors import Incompatible, InvalidRequest
from stitch.thresholds import Thresholds
from stitch.tokenizer_files import tokenizer_hash
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.probe import MAX_PROBE_TOKENS, Probe, ProbeBinding, feature_count, pool
from stitch_server.sources.resolve import resolve
from stitch_training.activations import Progress
from stitch_training.calibration import calibrate, percentiles, relative_costs, resolve_budget
from stitch_training.device import CPU
from stitch_training.labels import LabelledSet, folds, prompt_key, read_prompts
from stitch_training.models import CausalSequences
from stitch_training.recovery import Float64Array
from stitch_training.report import Rankings, as_json, rank_sources, table, training_record, write_json

# Prompts of one length that run through the layers together.
BATCH_PROMPTS = 4
# λ ÷ rows, which is weighed against a standardized feature's variance of 1.
PENALTIES = tuple(10.0**exponent for exponent in np.arange(-3, 2.01, 0.25))


@dataclass(frozen=True)
class ProbeSettings:
    """The cluster, the window and the cross-validation of a probe."""

    cluster: ClusterConfig
    # Number of a prompt's first tokens that the probe reads.
    tokens: int
    # The mean cost that its own thresholds keep to, 0 (all cheapest) to 1 (all costliest).
    budget: float
    folds: int
    dtype: torch.dtype
    # Whether every prompt is the first turn of a conversation.
    is_chat: bool
    device: torch.device = CPU

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, object, str], ...] = (
            ("tokens", 1 <= self.tokens <= MAX_PROBE_TOKENS, self.tokens, f"it must be 1 to {MAX_PROBE_TOKENS}"),
            ("budget", 0 <= self.budget <= 1, self.budget, "it must be 0 to 1"),
            ("folds", self.folds >= 2, self.folds, "it must be at least 2"),
            ("routes", len(self.cluster.routes) >= 2, len(self.cluster.routes), "there must be two to decide between"),
            *(
                ("routes", route.bottom_layers > 0, route.name, "it has no bottom layers, which a probe decides after")
                for route in self.cluster.routes
            ),
        )
        for field, is_valid, value, limit in checks:
            if not is_valid:
                raise InvalidRequest(field, value, limit)


@dataclass(frozen=True)
class TrainedProbe:
    """A probe, and its cross-validated figures by source and pair of routes."""

    probe: Probe
    found: dict[str, dict[str, Rankings]]


def routes_by_cost(cluster: ClusterConfig) -> tuple[str, ...]:
    """Returns the routes by parameters read per token, cheapest first, in the gateway's order."""
    folders = [resolve(cluster.model_source(role), cache_folder()) for role in ("bottom", "top")]
    bottom, top = (ParameterCount.read(folder) for folder in folders)

    def cost(name: str) -> tuple[int, int]:
        route = cluster.route(name)
        parameters = bottom.between(0, route.bottom_layers)
        parameters += bottom.head if route.top_from is None else top.between(route.top_from, None) + top.head
        return parameters, route.bottom_layers

    return tuple(sorted((route.name for route in cluster.routes), key=cost))


def train_probe(settings: ProbeSettings, sets: Sequence[LabelledSet], progress: Progress) -> TrainedProbe:
    """Trains a probe on all sets. Raises InvalidRequest or Incompatible where settings, data or model don't fit."""
    cluster, prompts = settings.cluster, [prompt for labelled in sets for prompt in labelled.prompts]
    folder = resolve(cluster.model_source("bottom"), cache_folder())
    layer, device = cluster.earliest_cut, settings.device
    extractor = FeatureExtractor.load(folder, layer, settings.tokens, settings.dtype, settings.is_chat, device)
    rows = extractor.from_texts(prompts, lambda done, total: progress("reading prompts", done, total))
    qualities = np.concatenate([labelled.qualities for labelled in sets])
    gains = qualities[:, 1:] - qualities[:, :1]
    unseen = cross_validated_gains(rows, gains, folds([prompt_key(prompt) for prompt in prompts], settings.folds))
    found = rank_sources(sets, unseen)
    bottom = ModelDescription.read(folder, cluster.models.bottom.id)
    tokenizer = tokenizer_hash(folder)
    binding = ProbeBinding.of(bottom, cluster.earliest_cut, settings.tokens, sets[0].routes, tokenizer)
    record = {**training_record(sets, found), "folds": settings.folds, "chat": settings.is_chat}
    return TrainedProbe(_to_probe(fit_ridge(rows, gains), binding, unseen, settings.budget, record), found)


def cross_validated_gains(rows: Float64Array, gains: Float64Array, fold: NDArray[np.int64]) -> Float64Array:
    """Returns gains `[rows, routes]`, first column 0, of every row by a regression on the other folds."""
    predicted = np.zeros((len(gains), gains.shape[1] + 1))
    for held_out in np.unique(fold):
        ridge = fit_ridge(rows[fold != held_out], gains[fold != held_out])
        predicted[fold == held_out, 1:] = ridge.predict(rows[fold == held_out])
    return predicted


def _to_probe(
    ridge: Ridge, binding: ProbeBinding, unseen: Float64Array, budget: float, record: dict[str, Any]
) -> Probe:
    calibration = calibrate(unseen, relative_costs(binding.routes, None), budget)
    return Probe(
        weight=torch.from_numpy(ridge.weights.T.astype(np.float32)).contiguous(),
        bias=torch.from_numpy(ridge.bias.astype(np.float32)),
        binding=binding,
        thresholds=calibration.thresholds,
        percentiles=percentiles(unseen[:, -1]),
        training={**record, "penalty": ridge.penalty, "budget": budget, "shares": calibration.shares},
    )


def write_probe(trained: TrainedProbe, out: Path) -> None:
    """Writes the artifact and its report (.json); prints the figures."""
    probe = trained.probe
    probe.save(out)
    unseen = {source: as_json(found) for source, found in trained.found.items()}
    write_json(out.with_suffix(".json"), {"probe": probe.fingerprint, "training": probe.training, "unseen": unseen})
    for source, found in trained.found.items():
        for pair, rankings in found.items():
            print(table(f"{source}, {pair}, rows unseen:", rankings), end="\n\n")
    print(f"{out}: fingerprint {probe.fingerprint}, with its report (.json)")


def calibrate_probe(
    cluster: ClusterConfig,
    path: Path,
    data: Sequence[Path],
    budget: float | None,
    cost: float | None,
    costs: Mapping[str, float] | None,
    dtype: torch.dtype,
    progress: Progress,
    device: torch.device = CPU,
) -> tuple[Thresholds, str]:
    """Calibrates a probe on prompts, which need no labels; returns its thresholds and their summary.

    Raises InvalidRequest or Incompatible where the target, the data, the probe or the cluster don't fit together.
    """
    probe = Probe.load(path, CPU)
    budget, relative = resolve_budget(budget, cost, costs, probe.binding.routes)
    folder = resolve(cluster.model_source("bottom"), cache_folder())
    bottom = ModelDescription.read(folder, cluster.models.bottom.id)
    probe.check(bottom, cluster.earliest_cut, [route.name for route in cluster.routes], tokenizer_hash(folder))
    prompts = [prompt for file in data for prompt in read_prompts(file)]
    is_chat, binding = bool(probe.training.get("chat")), probe.binding
    extractor = FeatureExtractor.load(folder, binding.layer, binding.tokens, dtype, is_chat, device)
    rows = extractor.from_texts(prompts, lambda done, total: progress("reading prompts", done, total))
    predicted = rows @ probe.weight.double().numpy().T + probe.bias.double().numpy()
    gains = np.hstack([np.zeros((len(rows), 1)), predicted])
    found = calibrate(gains, relative, budget)
    thresholds = found.to_thresholds(binding.routes, probe.fingerprint, gains, relative)
    return thresholds, found.summary(binding.routes, len(prompts))


@dataclass(frozen=True)
class FeatureExtractor:
    """The bottom model's lower layers, and the tokenization of prompts."""

    embedding: Embedding
    layers: DecoderLayers
    encode: Callable[[str], list[int]]
    # Number of a prompt's first tokens that are read.
    tokens: int
    # Where the layers are.
    device: torch.device

    @classmethod
    def load(
        cls, folder: Path, layer: int, tokens: int, dtype: torch.dtype, is_chat: bool, device: torch.device = CPU
    ) -> FeatureExtractor:
        """Loads layers [0, layer) on the device; `is_chat`: every prompt is the first turn of a conversation.

        Raises Incompatible where the model has no such layers, or no chat template where one is needed.
        """
        layers = DecoderLayers.load(folder, 0, layer, device, dtype)
        encode = chat_encoder(folder) if is_chat else plain_encoder(folder)
        return cls(Embedding.load(folder, device, dtype), layers, encode, tokens, device)

    def from_texts(self, prompts: Sequence[str], progress: Callable[[int, int], None]) -> Float64Array:
        """Returns features `[prompts, features]`; `progress(done, total)` is called after every batch."""
        return self.from_tokens([self.encode(prompt) for prompt in prompts], progress)

    def from_tokens(self, prompts: Sequence[Sequence[int]], progress: Callable[[int, int], None]) -> Float64Array:
        """Returns the features of token ids. Raises InvalidRequest for an empty prompt."""
        windows = [prompt[: self.tokens] for prompt in prompts]
        empty = [index for index, window in enumerate(windows) if not window]
        if empty:
            raise InvalidRequest("data", f"prompt {empty[0] + 1}", "it must have a token at least")
        rows, done = np.empty((len(windows), feature_count(self.layers.hidden_size))), 0
        for batch in _batches_by_length(windows):
            rows[batch] = self._pool([windows[index] for index in batch])
            done += len(batch)
            progress(done, len(windows))
        return rows

    @torch.inference_mode()
    def _pool(self, windows: Sequence[Sequence[int]]) -> Float64Array:
        """Returns features `[prompts, features]` of prompts of one length."""
        tokens = torch.tensor(windows).to(self.device)
        count, length = tokens.shape
        rotary = self.layers.rotary(torch.arange(length, device=self.device).repeat(count))
        hidden = self.embedding(tokens.flatten())
        states = self.layers.run(hidden, rotary, CausalSequences(count), 0, self.layers.end).view(count, length, -1)
        rows: Float64Array = torch.stack([pool(one) for one in states]).double().cpu().numpy()
        return rows


def plain_encoder(folder: Path) -> Callable[[str], list[int]]:
    """Returns a function that tokenizes a plain `prompt` as the gateway does, with the tokenizer's special tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=True).ids)


def chat_encoder(folder: Path) -> Callable[[str], list[int]]:
    """Returns a function that tokenizes a chat of one turn as the gateway does.

    Raises Incompatible where the folder has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise Incompatible(f"{folder} has no chat template, so prompts can't be conversations")

    def encode(text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        return list(map(int, ids))

    return encode


def _batches_by_length(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns batches of prompt indices, each of prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(index)
    return [
        members[start : start + BATCH_PROMPTS]
        for _, members in sorted(by_length.items())
        for start in range(0, len(members), BATCH_PROMPTS)
    ]


@dataclass(frozen=True)
class Ridge:
    """predictions [rows, targets] = features [rows, features] · weights + bias."""

    weights: Float64Array
    bias: Float64Array
    # λ ÷ rows.
    penalty: float

    def predict(self, rows: Float64Array) -> Float64Array:
        predicted: Float64Array = rows @ self.weights + self.bias
        return predicted


def fit_ridge(rows: Float64Array, targets: Float64Array) -> Ridge:
    """Fits targets [rows, targets] on features [rows, features]; a feature that never varies gets no weight."""
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    standard, centre = (rows - mean) * scale, targets.mean(axis=0)
    variances, axes = np.linalg.eigh(standard.T @ standard)
    variances = np.maximum(variances, 0.0)
    rotated = standard @ axes
    projected = rotated.T @ (targets - centre)
    penalty = min(PENALTIES, key=lambda one: _leave_one_out_error(rotated, variances, projected, targets - centre, one))
    solved = axes @ (projected / (variances + penalty * len(rows))[:, None])
    weights = solved * scale[:, None]
    return Ridge(weights, centre - mean @ weights, penalty)


def _leave_one_out_error(
    rotated: Float64Array, variances: Float64Array, projected: Float64Array, targets: Float64Array, penalty: float
) -> float:
    """Returns the mean squared leave-one-out error."""
    shrunk = 1 / (variances + penalty * len(rotated))
    residuals = targets - rotated @ (projected * shrunk[:, None])
    # The mean of all rows is fitted as well, which adds 1 / rows to every row's leverage.
    leverage = (rotated**2) @ shrunk + 1 / len(rotated)
    return float(((residuals / (1 - leverage)[:, None]) ** 2).mean())
