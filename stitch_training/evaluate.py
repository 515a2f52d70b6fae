"""Measures both whole models and every route of a cluster on held-out text, and on questions with a gold answer.

For each of them: cross-entropy, agreement with the bottom model's greedy tokens, and the share of questions whose
greedily generated answer matches the gold answer (exact match).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, RouteConfig
from stitch.errors import InvalidRequest
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore, Span
from stitch_training.activations import Progress
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, parameters_of, whole_parameters
from stitch_training.data import Corpus, DataSettings
from stitch_training.fit import check_cut
from stitch_training.labelling import matches_gold
from stitch_training.labels import read_json_lines
from stitch_training.least_squares import CutPoint
from stitch_training.models import FolderEncoder, LoadedPair, load_pair
from stitch_training.scoring import (
    Interval,
    Pipeline,
    bootstrap,
    by_file,
    greedy_tokens,
    map_of,
    sequence_losses,
    stitched,
    whole,
    without_layers,
)

# Questions that are generated in one batch.
BATCH_QUESTIONS = 16


@dataclass(frozen=True)
class EvaluationSettings:
    """The cluster, the data of which the held-out part is read, and the questions."""

    cluster: ClusterConfig
    data: DataSettings
    dtype: str
    # 100: all documents, for files that no fit was given.
    held_out_percent: int = 10
    # Questions with a gold `answer`, their number, and the length of an answer; None: no questions.
    gold: Path | None = None
    gold_rows: int = 100
    gold_tokens: int = 256


def evaluate(settings: EvaluationSettings, progress: Progress) -> Ladder:
    """Measures both whole models and every route.

    Raises InvalidRequest for data or questions that can't be read, and Incompatible where a route's stitch was made for
    other models, another cut or another tokenizer.
    """
    questions = read_questions(settings.gold, settings.gold_rows) if settings.gold is not None else []
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    pipelines = {BOTTOM: whole(loaded.pair.bottom), TOP: whole(loaded.pair.top)}
    costs = whole_parameters(loaded)
    for route in settings.cluster.routes:
        pipelines[route.name] = pipeline = pipeline_of(loaded, settings.cluster, route)
        cut, adapters = CutPoint(route.bottom_layers, route.top_from), pipeline.stages[-1].adapters
        rank = 0 if adapters is None else adapters.rank
        costs[route.name] = parameters_of(loaded, cut, route.stitch is not None, rank)
    corpus = Corpus(settings.data.files, loaded.encoder, settings.data.sequence_tokens, settings.held_out_percent)
    held_out = corpus.held_out(settings.data.held_out_tokens)
    tokens = torch.tensor([sequence.token_ids for sequence in held_out])
    files = torch.tensor([sequence.file for sequence in held_out])
    names = [path.name for path in settings.data.files]
    reference = greedy_tokens(pipelines[BOTTOM], tokens)
    exact_match = ExactMatch(loaded.encoder, questions, loaded.pair.vocabulary, settings.gold_tokens)
    rungs = []
    for number, (name, pipeline) in enumerate(pipelines.items(), 1):
        losses = by_file(sequence_losses(pipeline, tokens), files, names)
        agreement = (greedy_tokens(pipeline, tokens) == reference).double().mean(1)
        matched = exact_match.measure(pipeline, partial(progress, f"generate, {name}"))
        rungs.append(Rung(name, costs[name], losses, bootstrap(agreement), matched))
        progress("evaluate", number, len(pipelines))
    return Ladder(rungs[0], rungs[1], tuple(rungs[2:]))


def pipeline_of(loaded: LoadedPair, cluster: ClusterConfig, route: RouteConfig) -> Pipeline:
    """Returns a route as it is served: its layers, and its stitch where it has one."""
    cut = CutPoint(route.bottom_layers, route.top_from)
    check_cut(loaded, cut)
    path = cluster.stitch_file(route)
    if path is None:
        return without_layers(loaded.pair.bottom, cut)
    stitch = loaded.load_stitch(path, cut)
    return stitched(loaded.pair, cut, map_of(stitch), stitch.adapters)


@dataclass(frozen=True)
class Question:
    """A question and its gold answer."""

    text: str
    gold: str


def read_questions(path: Path, limit: int) -> list[Question]:
    """Reads the first `limit` rows of a JSON Lines file, which have `question` or `prompt`, and `answer`.

    Raises InvalidRequest, which names the line, where a row has no answer.
    """
    questions = []
    for number, row in islice(read_json_lines(path), limit):
        if not isinstance(row.get("answer"), str):
            raise InvalidRequest("gold", f"{path.name}:{number}", "it needs an `answer`")
        questions.append(Question(row["prompt"], row["answer"]))
    if not questions:
        raise InvalidRequest("gold", path.name, "it must have a question")
    return questions


@dataclass(frozen=True)
class ExactMatch:
    """The questions that every pipeline answers greedily, each as a conversation of one turn."""

    encoder: FolderEncoder
    questions: Sequence[Question]
    # Tokens that both models have.
    vocabulary: int
    max_tokens: int

    def measure(self, pipeline: Pipeline, progress: Callable[[int, int], None]) -> Interval | None:
        """Returns the share of answers that match their gold answer; None without questions."""
        matches: list[float] = []
        for start in range(0, len(self.questions), BATCH_QUESTIONS):
            batch = self.questions[start : start + BATCH_QUESTIONS]
            prompts = [self.encoder.encode_question(question.text) for question in batch]
            answers = generate_greedy(pipeline, prompts, self.vocabulary, self.max_tokens, self.encoder.ends)
            texts = map(self.encoder.decode, answers)
            matches += [float(matches_gold(text, question.gold)) for text, question in zip(texts, batch, strict=True)]
            progress(len(matches), len(self.questions))
        return bootstrap(torch.tensor(matches, dtype=torch.float64)) if matches else None


@dataclass
class _Generation:
    """A prompt with its generated tokens, and its blocks in each stage's KV cache."""

    token_ids: list[int]
    blocks: range
    cached: int = 0
    generated: list[int] = field(default_factory=list)

    def span(self) -> Span:
        return Span(self.cached, len(self.token_ids) - self.cached, self.blocks)

    def append(self, token: int) -> None:
        self.cached = len(self.token_ids)
        self.token_ids.append(token)
        self.generated.append(token)

    def is_running(self, max_tokens: int, ends: Collection[int]) -> bool:
        return self.generated[-1] not in ends and len(self.generated) < max_tokens


def generate_greedy(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], vocabulary: int, max_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """Generates from each prompt up to the first of the `ends` tokens, or `max_tokens` tokens, with a KV cache.

    Only the first `vocabulary` tokens are generated.
    """
    generations = list(_allocate(prompts, max_tokens))
    blocks = generations[-1].blocks.stop if generations else 0
    stores = [stage.model.new_store(stage.first, stage.end, blocks) for stage in pipeline.stages]
    with torch.no_grad():
        # Prompts are prefilled one by one; all at once would need the memory of a long batch.
        for generation in generations:
            _decode_step(pipeline, stores, vocabulary, [generation])
        running = [one for one in generations if one.is_running(max_tokens, ends)]
        while running:
            _decode_step(pipeline, stores, vocabulary, running)
            running = [one for one in running if one.is_running(max_tokens, ends)]
    return [one.generated for one in generations]


def _allocate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[_Generation]:
    first = 0
    for prompt in prompts:
        end = first - (-(len(prompt) + max_tokens) // BLOCK_TOKENS)
        yield _Generation(list(prompt), range(first, end))
        first = end


def _decode_step(
    pipeline: Pipeline, stores: Sequence[KVStore], vocabulary: int, generations: Sequence[_Generation]
) -> None:
    """Generates one more token for each generation."""
    spans = [one.span() for one in generations]
    new_tokens = [token for one in generations for token in one.token_ids[one.cached :]]
    hidden = pipeline.stages[0].model.embed(torch.tensor(new_tokens))
    ends = list(accumulate(span.length for span in spans))
    starts = [end - span.length for end, span in zip(ends, spans, strict=True) if span.position == 0]
    for index, (stage, store) in enumerate(zip(pipeline.stages, stores, strict=True)):
        hidden = pipeline.between(hidden, starts) if index else hidden
        hidden = stage.model.extend(hidden, spans, store, stage.adapters)
    last = torch.tensor(ends) - 1
    sampled: Tensor = pipeline.head.logits(hidden[last])[:, :vocabulary].argmax(1)
    for one, token in zip(generations, sampled.tolist(), strict=True):
        one.append(token)
