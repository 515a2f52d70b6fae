"""Small sets of labels with a gain that words and numbers give away. Knows no router."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_HARD = ["prove", "derive", "integral", "theorem", "matrix", "eigenvalue"]
_EASY = ["hello", "weather", "colour", "breakfast", "holiday", "music"]
_FILLER = ["the", "a", "of", "and", "to", "in", "is", "it", "for", "with", "on", "that", "this"]


def rows(count: int = 120, seed: int = 0, routes: tuple[str, ...] = ("weak", "strong")) -> list[dict[str, Any]]:
    """Half of the prompts are hard: there the weakest route fails and each dearer one succeeds more often."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        hard = number % 2 == 0
        words = draw.choices(_HARD if hard else _EASY, k=3) + draw.choices(_FILLER, k=draw.randint(3, 9))
        draw.shuffle(words)
        worth = [0.9 - (0.8 if hard else 0.1) * (1 - rung / (len(routes) - 1)) for rung in range(len(routes))]
        qualities = {route: float(draw.random() < value) for route, value in zip(routes, worth, strict=True)}
        prompt = f"{' '.join(words)} {number}?"
        made.append({"prompt": prompt, "task": "hard" if hard else "easy", "routes": qualities})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
