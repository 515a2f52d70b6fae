"""Both models alone and every route of a cluster on held-out text. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, RouteConfig
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, parameters_of, whole_parameters
from stitch_training.exact_match import Exam, read_questions
from stitch_training.fit import check_cut
from stitch_training.packing import Corpus, DataSettings
from stitch_training.pairs import LoadedPair, load_pair
from stitch_training.scoring import (
    System,
    alone,
    bootstrapped,
    by_file,
    greedy_tokens,
    left_out,
    losses,
    map_of,
    stitched,
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation is told; of the data only the held-out part is read, unless all of it is to be."""

    cluster: ClusterConfig
    data: DataSettings
    dtype: str
    held_out_percent: int = 10
    # Questions with a gold `answer`, how many of them, and how long an answer may be; None: nothing is asked.
    gold: Path | None = None
    gold_rows: int = 100
    gold_tokens: int = 256


def evaluate(settings: EvaluationSettings, progress: Progress) -> Ladder:
    """Cross-entropy, agreement with the bottom's greedy tokens, and right answers, of both models and every route.

    Raises InvalidRequest for data or questions that can't be read, and Incompatible where a route's stitch was made for
    other models, another cut or another tokenizer.
    """
    questions = read_questions(settings.gold, settings.gold_rows) if settings.gold is not None else []
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    systems = {BOTTOM: alone(loaded.pair.bottom), TOP: alone(loaded.pair.top)}
    costs = whole_parameters(loaded)
    for route in settings.cluster.routes:
        systems[route.name] = system = system_of(loaded, settings.cluster, route)
        cut, adapters = (route.bottom_layers, route.top_from), system.legs[-1].adapters
        rank = 0 if adapters is None else adapters.rank
        costs[route.name] = parameters_of(loaded, cut, route.stitch is not None, rank)
    corpus = Corpus(settings.data.files, loaded.encoder, settings.data.sequence_tokens, settings.held_out_percent)
    held = corpus.held_out(settings.data.held_out_tokens)
    tokens = torch.tensor([sequence.token_ids for sequence in held])
    files = torch.tensor([sequence.file for sequence in held])
    names = [path.name for path in settings.data.files]
    reference = greedy_tokens(systems[BOTTOM], tokens)
    exam = Exam(loaded.encoder, questions, loaded.pair.vocabulary, settings.gold_tokens)
    rungs = []
    for number, (name, system) in enumerate(systems.items(), 1):
        values, agreement = measured(system, tokens, reference)
        right = exam.grade(system, partial(progress, f"answer, {name}"))
        rungs.append(Rung(name, costs[name], by_file(values, files, names), bootstrapped(agreement), right))
        progress("evaluate", number, len(systems))
    return Ladder(rungs[0], rungs[1], tuple(rungs[2:]))


def system_of(loaded: LoadedPair, cluster: ClusterConfig, route: RouteConfig) -> System:
    """A route as it is served: its layers, and its stitch where it has one."""
    cut = route.bottom_layers, route.top_from
    check_cut(loaded, cut)
    path = cluster.stitch_file(route)
    if path is None:
        return left_out(loaded.pair.bottom, cut)
    stitch = loaded.stitch(path, cut)
    return stitched(loaded.pair, cut, map_of(stitch), stitch.adapters)


def measured(system: System, tokens: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Per sequence: mean cross-entropy, and the share of tokens where the greedy choice is the reference's."""
    agreement = (greedy_tokens(system, tokens) == reference).double().mean(1)
    return losses(system, tokens), agreement
