"""What is right counts, whatever else an answer says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from stitch_training import exact_match as exam
from stitch_training.encoding import FolderEncoder
from stitch_training.exact_match import Exam, Question
from stitch_training.scoring import System

SAID = {"2 + 3": "It is 5.", "2 + 4": "I say 5, no, 7", "the capital": "Paris, of course"}


class Letters:
    """An encoder whose tokens are characters."""

    ends = frozenset({0})

    def encode_question(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def test_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(system: System, prompts: Sequence[Sequence[int]], *settings: Any) -> list[list[int]]:
        assert settings == (256, 40, {0})
        return [list(map(ord, SAID["".join(map(chr, prompt))])) for prompt in prompts]

    monkeypatch.setattr(exam, "answers", answered)
    golds = zip(SAID, ("#### 5", "#### 6", "Paris"), strict=True)
    asked = Exam(cast(FolderEncoder, Letters()), [Question(*one) for one in golds], 256, 40)
    found = asked.grade(cast(System, None), lambda done, of: None)
    assert found is not None
    assert found.mean == pytest.approx(2 / 3)
    assert Exam(asked.encoder, [], 256, 40).grade(cast(System, None), lambda done, of: None) is None
