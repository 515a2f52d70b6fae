"""What an answer is worth, by each measure."""

from __future__ import annotations

import pytest

from stitch_training.quality import grade, states


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


class Routes:
    """Strong says 5 and finds it sure, weak says 4 and finds everything unlikely."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    async def answer(self, prompt: str, route: str) -> str:
        self.asked.append(("answer", prompt, route))
        return {"weak": "it is 4", "strong": "it is 5"}[route]

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        self.asked.append(("likelihood", prompt, route, answer))
        return {"weak": 0.25, "strong": 0.75}[route]


NAMES = ("weak", "strong")


async def test_a_gold_answer_is_the_best_measure() -> None:
    graded = await grade({"prompt": "2+3", "answer": "#### 5", "reference": "it is 4"}, NAMES, Routes())
    assert (graded.qualities, graded.measure) == ({"weak": 0.0, "strong": 1.0}, "gold")


async def test_then_how_likely_a_reference_is_without_an_answer_of_any_route() -> None:
    routes = Routes()
    graded = await grade({"prompt": "2+3", "reference": "it is 4"}, NAMES, routes)
    assert (graded.qualities, graded.measure) == ({"weak": 0.25, "strong": 0.75}, "reference")
    assert routes.asked == [("likelihood", "2+3", route, "it is 4") for route in NAMES]


async def test_then_how_likely_the_strongest_route_s_answer_is() -> None:
    routes = Routes()
    graded = await grade({"prompt": "2+3", "answer": None}, NAMES, routes)
    assert (graded.qualities, graded.measure) == ({"weak": 0.25, "strong": 0.75}, "agreement")
    first, *others = routes.asked
    assert first == ("answer", "2+3", "strong")
    assert others == [("likelihood", "2+3", route, "it is 5") for route in NAMES]
