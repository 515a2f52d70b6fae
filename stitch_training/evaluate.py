"""Measures both whole models, every stitched route and controls, into one table: JSON, Markdown and a plot.

On held-out text: cross-entropy, and agreement with the bottom model's greedy tokens, of content by role and by file,
template and separators apart. On prompts that are kept back: figures of answers (`answer_quality`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, Quantization, RouteConfig
from stitch.errors import InvalidRequest
from stitch_server.model.ffn_skip import FfnGates
from stitch_server.model.stitch import Stitch
from stitch_training.activations import Progress
from stitch_training.answer_quality import AnswerQuality, AnswerSettings
from stitch_training.cost_ladder import BOTTOM, TOP, Kind, Ladder, Rung, adapted_name, parameters_of, whole_parameters
from stitch_training.data import Corpus, DataSettings
from stitch_training.device import CPU
from stitch_training.fit import check_cut, cut_of
from stitch_training.intervals import Sample
from stitch_training.least_squares import CutPoint, is_identity
from stitch_training.models import LoadedPair, load_pair
from stitch_training.report import write_json
from stitch_training.scoring import (
    Pipeline,
    Slices,
    Stage,
    TextScores,
    generated_tokens,
    map_of,
    stitched,
    text_scores,
    whole,
)

# What a report of `benchmarks.bench_routes` has of every route: the time between tokens and to the first one.
TIMINGS = ("ms per token", "TTFT in ms")


@dataclass(frozen=True)
class EvaluationSettings:
    """The cluster, the data of which the held-out part is read, and the prompts to answer."""

    cluster: ClusterConfig
    data: DataSettings
    dtype: str
    # 100: all documents and prompts, for files that no fit was given.
    held_out_percent: int = 10
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    # Files of `fit --control`.
    controls: tuple[Path, ...] = ()
    # Kinds of quantized weights, by which every system is measured once more.
    quantizations: tuple[Quantization, ...] = ()
    # A report of `benchmarks.bench_routes` of this cluster.
    timings: Path | None = None
    device: torch.device = CPU


@dataclass(frozen=True)
class System:
    """A whole model, a route or a control, as it is measured."""

    name: str
    kind: Kind
    pipeline: Pipeline
    # Read per token.
    parameters: int


@dataclass(frozen=True, eq=False)
class HeldOutTokens:
    """The held-out sequences `[sequences, tokens]`, their slices, and the bottom model's scores.

    Where a route leaves out FFNs of generated tokens, only what follows such tokens counts, of every system.
    """

    tokens: Tensor
    # Bool, of the same shape; None where no route leaves out FFNs.
    generated: Tensor | None
    slices: Slices
    bottom: Pipeline
    bottom_scores: TextScores

    @classmethod
    def read(cls, settings: EvaluationSettings, loaded: LoadedPair) -> HeldOutTokens:
        """Raises InvalidRequest where the data can't be read or are too few."""
        data = settings.data
        corpus = Corpus(data.files, loaded.encoder, data.sequence_tokens, settings.held_out_percent)
        held_out = corpus.held_out(data.held_out_tokens)
        tokens = torch.tensor([sequence.token_ids for sequence in held_out])
        roles = torch.tensor([sequence.roles for sequence in held_out])
        files = torch.tensor([sequence.file for sequence in held_out])
        has_skips = any(route.ffn_skip is not None for route in settings.cluster.routes)
        generated = generated_tokens(roles) if has_skips else None
        slices = Slices.of(roles, files, [path.name for path in data.files], generated)
        bottom = whole(loaded.pair.bottom)
        return cls(tokens, generated, slices, bottom, text_scores(bottom, tokens))

    def losses_and_agreement(self, pipeline: Pipeline) -> tuple[dict[str, Sample], dict[str, Sample]]:
        """Returns by slice the losses, and the shares of next tokens at which the likeliest is the bottom's."""
        scores = self.bottom_scores if pipeline == self.bottom else text_scores(pipeline, self.tokens, self.generated)
        is_same = scores.likeliest == self.bottom_scores.likeliest
        return self.slices.samples(scores.losses), self.slices.samples(is_same)


def evaluate(settings: EvaluationSettings, progress: Progress) -> Ladder:
    """Measures both whole models, every route that joins them or leaves out FFNs, and controls.

    Raises InvalidRequest for data or questions that can't be read, and Incompatible where a stitch was made for other
    models, another cut or another tokenizer.
    """
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype), settings.device)
    text = HeldOutTokens.read(settings, loaded)
    answers = AnswerQuality.read(settings.answers, settings.held_out_percent, loaded)
    timings = read_timings(settings)
    systems = systems_of(loaded, settings)
    total = len(systems) * (1 + len(settings.quantizations))
    rungs = []
    for number, system in enumerate(chain(systems, _quantized(settings)), 1):
        rungs.append(_measure(system, text, answers, timings.get(system.name, {}), progress))
        progress("evaluate", number, total)
    ends = {rung.name: rung for rung in rungs if rung.kind == "end"}
    others = tuple(rung for rung in rungs if rung.kind != "end")
    return Ladder(ends[BOTTOM], ends.get(TOP, ends[BOTTOM]), others)


def systems_of(loaded: LoadedPair, settings: EvaluationSettings) -> list[System]:
    """Returns the bottom, the top unless it is the bottom, the routes with a stitch or gates, and the controls.

    Raises InvalidRequest where two controls are the same.
    """
    ends = [System(BOTTOM, "end", whole(loaded.pair.bottom), whole_parameters(loaded.bottom_count))]
    if not loaded.is_one_model:
        ends.append(System(TOP, "end", whole(loaded.pair.top), whole_parameters(loaded.top_count)))
    files = [(route, settings.cluster.stitch_file(route)) for route in settings.cluster.routes]
    routes = [route_system(loaded, route, file) for route, file in files if file is not None]
    routes += [skipping_system(loaded, settings.cluster, one) for one in settings.cluster.routes if one.ffn_skip]
    controls = [control_system(loaded, file) for file in settings.controls]
    names = [one.name for one in controls]
    if len(set(names)) < len(names):
        raise InvalidRequest("controls", names, "they must be different ones")
    return [*ends, *routes, *controls]


def _quantized(settings: EvaluationSettings) -> Iterator[System]:
    """Yields every system by each kind of quantized weights; the models of one kind alone are in memory at a time."""
    for quantization in settings.quantizations:
        loaded = load_pair(settings.cluster, getattr(torch, settings.dtype), settings.device, quantization)
        for system in systems_of(loaded, settings):
            yield replace(system, name=quantized_name(system.name, quantization), kind="quantized")


def quantized_name(name: str, quantization: Quantization) -> str:
    """Returns the name of a system by quantized weights."""
    return name if quantization == "none" else f"{name}, {quantization}"


def read_timings(settings: EvaluationSettings) -> dict[str, dict[str, Sample]]:
    """Reads by system what `benchmarks.bench_routes` has measured of the route that serves it.

    Raises InvalidRequest where the file is no such report, or lacks a route.
    """
    if settings.timings is None:
        return {}
    try:
        samples = json.loads(settings.timings.read_text())["samples"]
        return {
            quantized_name(system_name(route), quantization): {
                name: Sample.of(torch.tensor(samples[f"{quantized_name(route.name, quantization)}, {name}"]))
                for name in TIMINGS
            }
            for route in settings.cluster.routes
            for quantization in ("none", *settings.quantizations)
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequest("timings", settings.timings.name, f"it must time every route: {error}") from error


def system_name(route: RouteConfig) -> str:
    """Returns the name of what a route serves: one without a stitch and without gates is one of the models."""
    if route.stitch is not None or route.ffn_skip is not None:
        return route.name
    return TOP if route.bottom_layers == 0 else BOTTOM


def route_system(loaded: LoadedPair, route: RouteConfig, path: Path) -> System:
    """Returns a route as it is served: its layers, its stitch and its adapters."""
    cut = cut_of(route)
    check_cut(loaded, cut)
    stitch = loaded.load_stitch(path, cut)
    rank = 0 if stitch.adapters is None else stitch.adapters.rank
    pipeline = stitched(loaded.pair, cut, map_of(stitch), stitch.adapters)
    return System(route.name, "route", pipeline, parameters_of(loaded, cut, rank))


def skipping_system(loaded: LoadedPair, cluster: ClusterConfig, route: RouteConfig) -> System:
    """Returns a route that leaves out FFNs, as it is served. Raises Incompatible where its gates are of no model here.

    Its parameters are the mean of what a generated token reads.
    """
    path = cluster.ffn_skip_file(route)
    if path is None or route.ffn_skip is None:
        raise InvalidRequest("route", route.name, "the cluster file gives it no gates of FFNs")
    is_top = route.bottom_layers == 0
    model, described = (loaded.pair.top, loaded.top) if is_top else (loaded.pair.bottom, loaded.bottom)
    count, gates = loaded.top_count if is_top else loaded.bottom_count, FfnGates.load(path)
    gates.check_model(described)
    skip = gates.at(route.ffn_skip.share)
    pipeline = Pipeline((Stage(model, 0, model.depth, skip=skip),))
    return System(route.name, "route", pipeline, whole_parameters(count) - skip.saved_parameters(count))


def control_system(loaded: LoadedPair, path: Path) -> System:
    """Returns a whole model with what a control has learnt. Raises Incompatible where the file is none of this pair."""
    binding = Stitch.load(path, CPU, torch.float32).binding
    is_bottom = binding.bottom_revision == loaded.bottom.revision
    name, own = (BOTTOM, loaded.control("bottom")) if is_bottom else (TOP, loaded.control("top"))
    cut = CutPoint(binding.bottom_layers, binding.bottom_layers)
    stitch = own.load_stitch(path, cut)
    adapters, learnt = stitch.adapters, map_of(stitch)
    if adapters is not None and cut.k == 0 and is_identity(learnt):
        pipeline = Pipeline((Stage(own.pair.top, 0, own.pair.top.depth, adapters),))
        return System(adapted_name(name), "adapted", pipeline, whole_parameters(own.top_count) + adapters.parameters)
    rank = 0 if adapters is None else adapters.rank
    pipeline = stitched(own.pair, cut, learnt, adapters)
    return System(f"{name}, {cut.k} → {cut.k}", "control", pipeline, parameters_of(own, cut, rank))


def _measure(
    system: System, text: HeldOutTokens, answers: AnswerQuality, timings: dict[str, Sample], progress: Progress
) -> Rung:
    pipeline = system.pipeline
    losses, agreement = text.losses_and_agreement(pipeline)
    figures = answers.measure(pipeline, partial(progress, f"answers of {system.name}")) | timings
    return Rung(system.name, system.parameters, losses, agreement, figures, system.kind)


def write_evaluation(ladder: Ladder, settings: EvaluationSettings, out: Path | None) -> None:
    """Prints the tables, and writes figures (.json), tables (.md) and plot (.png) where `out` names a file."""
    print(ladder.markdown())
    if out is None:
        return
    data, answers = settings.data, settings.answers
    described = {
        "dtype": settings.dtype,
        "device": str(settings.device),
        "files": [path.name for path in data.files],
        "held_out_percent": settings.held_out_percent,
        "sequence_tokens": data.sequence_tokens,
        "controls": [path.name for path in settings.controls],
        "quantizations": settings.quantizations,
        "timings": None if settings.timings is None else settings.timings.name,
        "answers": answers.describe(),
    }
    write_json(out, {**described, **ladder.as_json()})
    out.with_suffix(".md").write_text(ladder.markdown())
    ladder.plot(out.with_suffix(".png"))
