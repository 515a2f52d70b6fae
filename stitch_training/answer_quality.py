"""How good a pipeline's answers are, on prompts that no training was given.

    agreement           share of the positions of the bottom model's own greedy answers, fed as they are, at which the
                        pipeline's likeliest token is the bottom's
    repeated 4-grams    share of the 4-grams in the pipeline's own greedy answers that were there before
    marked              share of these answers with the mark of a training set's answers, `####`
    exact match         share of questions whose greedy answer states the gold answer
    pass@1              share of functions whose greedily written code passes their doctests (`functions`)

Every pipeline has the same prompts, questions and functions, so differences are paired.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_training.data import Document, Turn, is_held_out, read_documents, shuffle
from stitch_training.folder_encoder import FolderEncoder
from stitch_training.functions import find_functions, is_correct, prompt_of
from stitch_training.generation import generate_greedy
from stitch_training.intervals import Sample
from stitch_training.labelling import GOLD_MARK, matches_gold
from stitch_training.labels import read_json_lines
from stitch_training.models import LoadedPair
from stitch_training.sandbox import DoctestedFunction
from stitch_training.scoring import Pipeline, whole

# Prompts whose answers are generated in one batch.
BATCH_PROMPTS = 16
GRAM = 4

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class AnswerSettings:
    """The prompts and questions to answer, the most of each, and the most tokens of an answer."""

    prompts: tuple[Path, ...] = ()
    prompt_rows: int = 40
    prompt_tokens: int = 128
    # Questions with a gold `answer`.
    gold: Path | None = None
    gold_rows: int = 100
    gold_tokens: int = 256
    # Functions of the standard library to write.
    functions: int = 0
    function_tokens: int = 384

    def describe(self) -> dict[str, Any]:
        """Returns what a report says of them."""
        prompts = {
            "files": [path.name for path in self.prompts],
            "rows": self.prompt_rows,
            "tokens": self.prompt_tokens,
        }
        gold = {"file": self.gold.name, "rows": self.gold_rows, "tokens": self.gold_tokens} if self.gold else None
        functions = {
            "rows": self.functions,
            "tokens": self.function_tokens,
            "library": f"Python {platform.python_version()}",
        }
        return {
            "prompts": prompts if self.prompts else None,
            "gold": gold,
            "functions": functions if self.functions else None,
        }


@dataclass(frozen=True)
class Question:
    """A question and its gold answer."""

    text: str
    gold: str


@dataclass(frozen=True)
class Generator:
    """Generates greedily, from prompts in batches."""

    encoder: FolderEncoder
    # Tokens that both models have.
    vocabulary: int

    def generate(
        self, pipeline: Pipeline, prompts: Sequence[list[int]], max_tokens: int, advance: Advance
    ) -> list[list[int]]:
        """Returns the answers' tokens, with the token that ends one."""
        answers: list[list[int]] = []
        for start in range(0, len(prompts), BATCH_PROMPTS):
            batch = prompts[start : start + BATCH_PROMPTS]
            answers += generate_greedy(pipeline, batch, self.vocabulary, max_tokens, self.encoder.ends)
            advance(len(answers), len(prompts))
        return answers


@dataclass(frozen=True)
class Reference:
    """The bottom model's own answers, and the likeliest tokens along them when they are fed as they are.

    In bfloat16 a near tie may fall otherwise than it did with a KV cache, so these are not always the answers' tokens.
    """

    answers: list[list[int]]
    likeliest: list[Tensor]


class AnswerQuality:
    """The prompts and questions that every pipeline answers, with the bottom model's own answers to the prompts."""

    def __init__(
        self,
        generator: Generator,
        settings: AnswerSettings,
        bottom: Pipeline,
        prompts: Sequence[list[int]],
        questions: Sequence[Question] = (),
        functions: Sequence[DoctestedFunction] = (),
    ) -> None:
        self._generator, self._settings, self._bottom = generator, settings, bottom
        self._prompts, self._questions, self._functions = prompts, questions, functions
        self._reference: Reference | None = None

    @classmethod
    def read(cls, settings: AnswerSettings, held_out_percent: int, loaded: LoadedPair) -> AnswerQuality:
        """Raises InvalidRequest where a file can't be read, has no prompt that is kept back, or no gold answer.

        And where code can't be tested on this machine.
        """
        prompts = kept_back_prompts(settings.prompts, held_out_percent, settings.prompt_rows)
        questions = read_questions(settings.gold, settings.gold_rows) if settings.gold is not None else []
        encoded = [loaded.encoder.encode_prompt(prompt) for prompt in prompts]
        generator = Generator(loaded.encoder, loaded.pair.vocabulary)
        functions = find_functions(settings.functions) if settings.functions else []
        return cls(generator, settings, whole(loaded.pair.bottom), encoded, questions, functions)

    def measure(self, pipeline: Pipeline, advance: Advance) -> dict[str, Sample]:
        """Returns the figures that there are prompts and questions for."""
        figures: dict[str, Sample] = {}
        if self._prompts:
            figures |= self._of_prompts(pipeline, advance)
        if self._questions:
            figures["exact match"] = self._exact_match(pipeline, advance)
        if self._functions:
            figures["pass@1"] = self._pass_at_one(pipeline, advance)
        return figures

    def _of_prompts(self, pipeline: Pipeline, advance: Advance) -> dict[str, Sample]:
        generate, tokens = self._generator.generate, self._settings.prompt_tokens
        vocabulary, is_bottom = self._generator.vocabulary, pipeline == self._bottom
        if self._reference is None:
            own = generate(self._bottom, self._prompts, tokens, advance)
            self._reference = Reference(own, likeliest_tokens(self._bottom, self._prompts, own, vocabulary))
        answers = self._reference.answers if is_bottom else generate(pipeline, self._prompts, tokens, advance)
        found = likeliest_tokens(pipeline, self._prompts, self._reference.answers, vocabulary)
        texts = map(self._generator.encoder.decode, answers)
        return {
            "agreement": agreement(found, self._reference.likeliest),
            "repeated 4-grams": repeated_grams(answers),
            "marked": Sample.of(torch.tensor([float(GOLD_MARK in text) for text in texts])),
        }

    def _exact_match(self, pipeline: Pipeline, advance: Advance) -> Sample:
        encoder = self._generator.encoder
        prompts = [encoder.encode_prompt([Turn("user", question.text)]) for question in self._questions]
        answers = self._generator.generate(pipeline, prompts, self._settings.gold_tokens, advance)
        pairs = zip(map(encoder.decode, answers), self._questions, strict=True)
        return Sample.of(torch.tensor([float(matches_gold(text, question.gold)) for text, question in pairs]))

    def _pass_at_one(self, pipeline: Pipeline, advance: Advance) -> Sample:
        encoder = self._generator.encoder
        prompts = [encoder.encode_prompt([Turn("user", prompt_of(function))]) for function in self._functions]
        answers = self._generator.generate(pipeline, prompts, self._settings.function_tokens, advance)
        pairs = zip(map(encoder.decode, answers), self._functions, strict=True)
        return Sample.of(torch.tensor([float(is_correct(text, function)) for text, function in pairs]))


def likeliest_tokens(
    pipeline: Pipeline, prompts: Sequence[list[int]], answers: Sequence[list[int]], vocabulary: int
) -> list[Tensor]:
    """Returns of every answer, at each of its tokens, the likeliest one after the prompt and those before."""
    found = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([[*prompt, *answer]])
            generated = torch.arange(tokens.shape[1])[None] >= len(prompt)
            states = pipeline.states(tokens, generated)[0, len(prompt) - 1 : -1]
            found.append(pipeline.head.logits(states)[:, :vocabulary].argmax(1).cpu())
    return found


def agreement(found: Sequence[Tensor], reference: Sequence[Tensor]) -> Sample:
    """Returns the share of equal tokens, of answers as they are resampled."""
    sums = [float((one == other).sum()) for one, other in zip(found, reference, strict=True)]
    counts = [float(len(one)) for one in found]
    return Sample(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def repeated_grams(answers: Sequence[Sequence[int]]) -> Sample:
    """Returns the share of GRAM tokens in a row that the same answer has had before."""
    grams = [list(zip(*(answer[start:] for start in range(GRAM)), strict=False)) for answer in answers]
    counts = torch.tensor([len(one) for one in grams], dtype=torch.float64)
    return Sample(counts - torch.tensor([len(set(one)) for one in grams]), counts)


def kept_back_prompts(files: Sequence[Path], percent: int, limit: int) -> list[tuple[Turn, ...]]:
    """Returns at most `limit` different prompts that training is not given, of the files in turn, in a fixed order.

    Raises InvalidRequest where a file has none.
    """
    streams = [_kept_back(path, percent) for path in files]
    found: dict[tuple[Turn, ...], None] = {}
    for path, stream in zip(files, streams, strict=True):
        first = next(stream, None)
        if first is None:
            raise InvalidRequest(
                "prompts", path.name, f"it must have a prompt among the {percent} % that are kept back"
            )
        found[first] = None
    while streams and len(found) < limit:
        for stream in list(streams):
            if (prompt := next(stream, None)) is None:
                streams.remove(stream)
            else:
                found[prompt] = None
    return list(islice(found, limit))


def _kept_back(path: Path, percent: int) -> Iterator[tuple[Turn, ...]]:
    def is_kept(document: Document) -> bool:
        return bool(document.prompt()) and is_held_out(document, percent)

    return (document.prompt() for document in shuffle(filter(is_kept, read_documents(path)), seed=0))


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
