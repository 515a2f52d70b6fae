"""The share of questions that a system answers as their gold answer does. Knows no cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from stitch.errors import InvalidRequest
from stitch_training.encoding import FolderEncoder
from stitch_training.gold import states
from stitch_training.greedy_answers import answers
from stitch_training.labels import read_json_lines
from stitch_training.scoring import Interval, System, bootstrapped

AT_ONCE = 16


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    text: str
    gold: str


def read_questions(path: Path, most: int) -> list[Question]:
    """The first `most` of a JSON Lines file whose objects have `question` or `prompt`, and `answer`.

    Raises InvalidRequest, which names the line, where one is off.
    """
    found = []
    for number, row in islice(read_json_lines(path), most):
        if not isinstance(row.get("answer"), str):
            raise InvalidRequest("gold", f"{path.name}:{number}", "it needs an `answer`")
        found.append(Question(row["prompt"], row["answer"]))
    if not found:
        raise InvalidRequest("gold", path.name, "it must have a question")
    return found


@dataclass(frozen=True)
class Exam:
    """Questions that every system is asked alike: each as a conversation of its own, answered greedily."""

    encoder: FolderEncoder
    questions: Sequence[Question]
    # Tokens that both models know.
    vocabulary: int
    most_tokens: int

    def grade(self, system: System, progress: Callable[[int, int], None]) -> Interval | None:
        """The share that is right; None where nothing is asked."""
        right: list[float] = []
        for start in range(0, len(self.questions), AT_ONCE):
            asked = self.questions[start : start + AT_ONCE]
            prompts = [self.encoder.encode_question(question.text) for question in asked]
            said = answers(system, prompts, self.vocabulary, self.most_tokens, self.encoder.ends)
            texts = map(self.encoder.decode, said)
            right += [float(states(text, question.gold)) for text, question in zip(texts, asked, strict=True)]
            progress(len(right), len(self.questions))
        return bootstrapped(torch.tensor(right, dtype=torch.float64)) if right else None
