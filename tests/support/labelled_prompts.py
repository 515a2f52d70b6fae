"""Small sets of labelled prompts whose gain can be predicted from their words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_HARD = ["prove", "derive", "integral", "theorem", "matrix", "eigenvalue"]
_EASY = ["hello", "weather", "colour", "breakfast", "holiday", "music"]
_FILLER = ["the", "a", "of", "and", "to", "in", "is", "it", "for", "with", "on", "that", "this"]


def rows(count: int = 120, seed: int = 0, routes: tuple[str, ...] = ("weak", "strong")) -> list[dict[str, Any]]:
    """Returns rows of which half are hard: on these the cheapest route fails, and costlier ones succeed more often."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        hard = number % 2 == 0
        words = draw.choices(_HARD if hard else _EASY, k=3) + draw.choices(_FILLER, k=draw.randint(3, 9))
        draw.shuffle(words)
        chances = [0.9 - (0.8 if hard else 0.1) * (1 - index / (len(routes) - 1)) for index in range(len(routes))]
        qualities = {route: float(draw.random() < chance) for route, chance in zip(routes, chances, strict=True)}
        prompt = f"{' '.join(words)} {number}?"
        made.append({"prompt": prompt, "task": "hard" if hard else "easy", "routes": qualities})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
