"""What an answer is worth, by each measure."""

from __future__ import annotations

import pytest

from router_gateway.training.quality import grade, shared_words, states


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("She has 3 + 4 = 7 apples.", "3 + 4 = 7\n#### 7", True),
        ("First 7, then 9.", "#### 7", False),
        ("It is $1,250.00", "#### 1250", True),
        ("It is -3", "-3", True),
        ("No number at all", "#### 7", False),
        ("", "#### 7", False),
        ("B. Paris", "B", True),
        ("The answer is B", "b", True),
        ("Because B is wrong, C", "B", False),
        ("It is the Eiffel Tower.", "Eiffel Tower", True),
        ("anything", "", False),
        ("", "B", False),
    ],
)
def test_an_answer_states_the_gold_or_not(answer: str, gold: str, right: bool) -> None:
    assert states(answer, gold) is right


@pytest.mark.parametrize(
    ("answer", "reference", "shared"),
    [
        ("the cat sat", "The cat sat!", 1.0),
        ("the cat", "a dog", 0.0),
        ("a b c d", "a b", 2 * 0.5 * 1 / 1.5),
        ("a a a", "a", 0.5),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_shared_words_are_the_mean_of_precision_and_recall(answer: str, reference: str, shared: float) -> None:
    assert shared_words(answer, reference) == pytest.approx(shared)


ANSWERS = {"weak": "it is 4", "strong": "it is 5"}


def test_a_gold_answer_is_the_best_measure() -> None:
    graded = grade({"answer": "#### 5", "reference": "it is 4"}, ANSWERS, ("weak", "strong"))
    assert (graded.qualities, graded.measure) == ({"weak": 0.0, "strong": 1.0}, "gold")


def test_then_a_reference() -> None:
    graded = grade({"reference": "it is 4"}, ANSWERS, ("weak", "strong"))
    assert graded.measure == "reference"
    assert graded.qualities["weak"] == 1.0 > graded.qualities["strong"]


def test_then_the_agreement_with_the_strongest_route() -> None:
    graded = grade({"answer": None}, ANSWERS, ("weak", "strong"))
    assert graded.measure == "agreement"
    assert graded.qualities == {"weak": pytest.approx(2 / 3), "strong": 1.0}
