"""From labelled prompts to a probe and what it is worth. Knows no file but the cluster's own.

The gain of every dearer route is regressed on what the probe sees. Figures are of rows that the regression has not
seen; the probe itself is fitted on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stitch.cluster import ClusterConfig
from stitch.environment import cache_folder
from stitch.errors import InvalidRequest
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.probe import MOST_TOKENS, PERCENTILES, Probe, ProbeBinding
from stitch_server.model.tokenizer_hash import tokenizer_hash
from stitch_server.sources.resolve import resolve
from stitch_training.calibration import calibrate, relative_costs
from stitch_training.folds import folds
from stitch_training.labels import LabelledSet, same_prompt
from stitch_training.probe_states import PromptReader
from stitch_training.recovery import Numbers
from stitch_training.ridge import Ridge, fit
from stitch_training.router_report import Rankings, pairs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TeachingSettings:
    """What a probe is made of."""

    cluster: ClusterConfig
    # Of a prompt's first tokens so many are read.
    tokens: int
    # The mean cost that its own thresholds keep to, 0 (all cheapest) to 1 (all dearest).
    budget: float
    folds: int
    dtype: torch.dtype
    chat: bool

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, object, str], ...] = (
            ("tokens", 1 <= self.tokens <= MOST_TOKENS, self.tokens, f"it must be 1 to {MOST_TOKENS}"),
            ("budget", 0 <= self.budget <= 1, self.budget, "it must be 0 to 1"),
            ("folds", self.folds >= 2, self.folds, "it must be at least 2"),
            ("routes", len(self.cluster.routes) >= 2, len(self.cluster.routes), "there must be two to decide between"),
        )
        for field, fits, value, limit in checks:
            if not fits:
                raise InvalidRequest(field, value, limit)


@dataclass(frozen=True)
class Taught:
    """A probe, and its figures by source and pair of routes."""

    probe: Probe
    found: dict[str, dict[str, Rankings]]


def cheapest_first(cluster: ClusterConfig) -> tuple[str, ...]:
    """The cluster's routes by the parameters that they read for a token, as the gateway orders them."""
    folders = [resolve(cluster.model_source(role), cache_folder()) for role in ("bottom", "top")]
    bottom, top = (ParameterCount.read(folder) for folder in folders)
    layers = ModelDescription.read(folders[1], "top").layers

    def read(name: str) -> tuple[int, int]:
        route = cluster.route(name)
        parameters = bottom.between(0, route.bottom_layers) + top.between(route.top_from, layers)
        return parameters, route.bottom_layers

    return tuple(sorted((route.name for route in cluster.routes), key=read))


def teach(settings: TeachingSettings, sets: Sequence[LabelledSet], progress: Progress) -> Taught:
    """Raises InvalidRequest or Incompatible where settings, data or model are off."""
    cluster, prompts = settings.cluster, [prompt for labelled in sets for prompt in labelled.prompts]
    folder = resolve(cluster.model_source("bottom"), cache_folder())
    reader = PromptReader.load(folder, cluster.earliest_cut, settings.tokens, settings.dtype, settings.chat)
    seen = reader.read(prompts, lambda done, of: progress("reading prompts", done, of))
    qualities = np.concatenate([labelled.qualities for labelled in sets])
    gains = qualities[:, 1:] - qualities[:, :1]
    unseen = unseen_gains(seen, gains, folds([same_prompt(prompt) for prompt in prompts], settings.folds))
    found = _figures(sets, unseen)
    bottom = ModelDescription.read(folder, cluster.models.bottom.id)
    tokenizer = tokenizer_hash(folder)
    binding = ProbeBinding.of(bottom, cluster.earliest_cut, settings.tokens, sets[0].routes, tokenizer)
    return Taught(_probe(fit(seen, gains), binding, unseen, settings, _provenance(sets, found, settings)), found)


def unseen_gains(seen: Numbers, gains: Numbers, fold: NDArray[np.int64]) -> Numbers:
    """`[rows, routes]`, first column 0: every row by a regression of the other folds."""
    predicted = np.zeros((len(gains), gains.shape[1] + 1))
    for held in np.unique(fold):
        taught = fit(seen[fold != held], gains[fold != held])
        predicted[fold == held, 1:] = taught.predict(seen[fold == held])
    return predicted


def _probe(
    taught: Ridge, binding: ProbeBinding, unseen: Numbers, settings: TeachingSettings, training: dict[str, Any]
) -> Probe:
    calibrated = calibrate(unseen, relative_costs(binding.routes, None), settings.budget)
    return Probe(
        weight=torch.from_numpy(taught.weights.T.astype(np.float32)).contiguous(),
        bias=torch.from_numpy(taught.bias.astype(np.float32)),
        binding=binding,
        thresholds=calibrated.thresholds,
        percentiles=tuple(np.quantile(unseen[:, -1], np.linspace(0, 1, PERCENTILES)).tolist()),
        training={**training, "penalty": taught.penalty, "budget": settings.budget, "shares": calibrated.shares},
    )


def _figures(sets: Sequence[LabelledSet], unseen: Numbers) -> dict[str, dict[str, Rankings]]:
    starts = np.cumsum([0, *map(len, sets)])
    return {
        one.name: pairs(one.routes, unseen[start : start + len(one)], one.prompts, one.qualities)
        for one, start in zip(sets, starts[:-1], strict=True)
    }


def _provenance(
    sets: Sequence[LabelledSet], found: dict[str, dict[str, Rankings]], settings: TeachingSettings
) -> dict[str, Any]:
    figures = {
        source: {
            pair: {"apgr": one["router"].apgr.value, "cpt_50": one["router"].cpt_50.value} for pair, one in of.items()
        }
        for source, of in found.items()
    }
    data = [{"name": one.name, "rows": len(one), "skipped": one.skipped, "sha256": one.fingerprint} for one in sets]
    return {"data": data, "folds": settings.folds, "chat": settings.chat, "unseen": figures}
