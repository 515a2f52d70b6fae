"""Agreement with the bottom's own answers, repetitions, exact match, and the prompts that are kept back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch_training import answer_quality
from stitch_training.answer_quality import (
    AnswerQuality,
    AnswerSettings,
    Generator,
    Question,
    agreement,
    kept_back_prompts,
    likeliest_tokens,
    read_questions,
    repeated_grams,
)
from stitch_training.data import Document, Turn, is_held_out
from stitch_training.folder_encoder import FolderEncoder
from stitch_training.generation import generate_greedy
from stitch_training.models import LoadedPair, load_pair
from stitch_training.sandbox import DoctestedFunction
from stitch_training.scoring import Pipeline, whole
from tests.support.tiny_fit import write_cluster

ANSWERS = {"2 + 3": "It is 5.", "2 + 4": "I say 5, no, 7", "the capital": "Paris, of course #### 4"}


class Letters:
    """An encoder whose tokens are characters."""

    ends = frozenset({0})

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        return list(map(ord, turns[-1].content))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def test_exact_match_is_the_share_of_answers_that_state_the_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(pipeline: Pipeline, prompts: Sequence[Sequence[int]], *settings: Any) -> list[list[int]]:
        assert settings == (256, 40, {0})
        return [list(map(ord, ANSWERS["".join(map(chr, prompt))])) for prompt in prompts]

    monkeypatch.setattr(answer_quality, "generate_greedy", generated)
    questions = [Question(*one) for one in zip(ANSWERS, ("#### 5", "#### 6", "Paris"), strict=True)]
    generator = Generator(cast(FolderEncoder, Letters()), 256)
    quality = AnswerQuality(generator, AnswerSettings(gold_tokens=40), cast(Pipeline, None), [], questions)
    figures = quality.measure(cast(Pipeline, None), lambda done, total: None)
    assert {name: sample.mean() for name, sample in figures.items()} == {"exact match": pytest.approx(2 / 3)}


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedPair:
    return load_pair(load_cluster(str(write_cluster(tmp_path))), torch.float32)


PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16])


def test_agreement_is_that_of_greedy_tokens_after_the_same_prefix(loaded: LoadedPair) -> None:
    bottom, top, vocabulary = whole(loaded.pair.bottom), whole(loaded.pair.top), loaded.pair.vocabulary
    answers = generate_greedy(bottom, PROMPTS, vocabulary, 9, ())
    reference = likeliest_tokens(bottom, PROMPTS, answers, vocabulary)
    assert [one.tolist() for one in reference] == answers
    found = agreement(likeliest_tokens(top, PROMPTS, answers, vocabulary), reference)
    for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        alone = [generate_greedy(top, [[*prompt, *answer[:at]]], vocabulary, 1, ())[0][0] for at in range(9)]
        assert found.sums[index] == sum(one == other for one, other in zip(alone, answer, strict=True))
    assert found.counts.tolist() == [9, 9, 9]
    assert found.mean() < 1


def test_repeated_grams_are_those_that_the_same_answer_had_before() -> None:
    found = repeated_grams([[1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [1, 2, 3]])
    assert (found.sums.tolist(), found.counts.tolist()) == ([0, 2, 0], [2, 3, 0])


def test_figures_of_prompts_are_of_the_pipelines_own_answers(loaded: LoadedPair) -> None:
    settings = AnswerSettings(prompt_tokens=12)
    bottom, generator = whole(loaded.pair.bottom), Generator(loaded.encoder, loaded.pair.vocabulary)
    quality = AnswerQuality(generator, settings, bottom, PROMPTS, [])
    of_bottom, of_top = (quality.measure(one, lambda done, total: None) for one in (bottom, whole(loaded.pair.top)))
    assert set(of_bottom) == {"agreement", "repeated 4-grams", "marked"}
    assert of_bottom["agreement"].mean() == 1 > of_top["agreement"].mean()
    own = generator.generate(whole(loaded.pair.top), PROMPTS, 12, lambda done, total: None)
    assert of_top["repeated 4-grams"].sums.tolist() == repeated_grams(own).sums.tolist()


def prompts_file(path: Path, count: int, **more: object) -> Path:
    rows = [{"question": f"{path.stem} {number}?", "answer": "yes", **more} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_those_kept_back_of_files_in_turn(tmp_path: Path) -> None:
    files = [prompts_file(tmp_path / name, 60) for name in ("a.jsonl", "b.jsonl")]
    found = kept_back_prompts(files, 20, 8)
    assert len(found) == 8
    assert all(is_held_out(Document(turns=prompt), 20) for prompt in found)
    assert [prompt[0].content[0] for prompt in found] == ["a", "b"] * 4
    assert found == kept_back_prompts(files, 20, 8) == kept_back_prompts(files, 20, 10)[:8]
    assert len(kept_back_prompts(files, 100, 1000)) == 120


def test_file_without_a_kept_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("no prompt")
    with pytest.raises(InvalidRequest, match=r"prompts is 'plain\.txt', but it must have a prompt among the 100 %"):
        kept_back_prompts([tmp_path / "plain.txt"], 100, 3)


def test_question_without_an_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gold.jsonl").write_text('{"question": "What is it?"}\n')
    with pytest.raises(InvalidRequest, match=r"gold is 'gold\.jsonl:1', but it needs an `answer`"):
        read_questions(tmp_path / "gold.jsonl", 3)


def test_pass_at_one_is_the_share_of_answers_whose_code_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [DoctestedFunction("m", name, f"def {name}():", ">>> 1\n1") for name in ("right", "wrong")]
    monkeypatch.setattr(answer_quality, "is_correct", lambda text, function: text == f"code of {function.name}")

    def generated(pipeline: Pipeline, prompts: Sequence[Sequence[int]], *settings: Any) -> list[list[int]]:
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        assert all(
            f"```python\ndef {name}():\n```" in text for text, name in zip(texts, ("right", "wrong"), strict=True)
        )
        return [list(map(ord, "code of right"))] * len(prompts)

    monkeypatch.setattr(answer_quality, "generate_greedy", generated)
    generator = Generator(cast(FolderEncoder, Letters()), 256)
    quality = AnswerQuality(generator, AnswerSettings(), cast(Pipeline, None), [], [], functions)
    figures = quality.measure(cast(Pipeline, None), lambda done, total: None)
    assert {name: sample.sums.tolist() for name, sample in figures.items()} == {"pass@1": [1, 0]}
