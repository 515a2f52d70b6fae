"""Names are the field's: no class, function, module or configuration field carries a word of this project's own.

The test reads every source file of the product and its benchmarks. It splits each name at underscores and capitals,
and compares the words, and some whole names, with two lists. Log lines, errors, metric help texts, docstrings and
comments may not contain the words that have no meaning of their own in the field.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("stitch", "stitch_server", "router_gateway", "stitch_training", "benchmarks")
# Words that no name may contain, with what stands in their place.
WORDS = {
    "ahead": "upstream, previous",
    "anew": "preempt, reset",
    "agreement": "compatibility check",
    "behind": "downstream, after, next",
    "bury": "tombstone",
    "buried": "tombstone",
    "catalogue": "model registry",
    "crowd": "padded decode group",
    "dear": "costly",
    "dearer": "costlier",
    "dearest": "most expensive",
    "deferred": "DeferredDecision",
    "exam": "exact match",
    "fork": "candidate chains",
    "intake": "session table",
    "judge": "decide, RouteDecision",
    "judged": "RouteDecision",
    "judgement": "RouteDecision",
    "lane": "micro-batch",
    "lanes": "micro-batches",
    "origin": "FirstStage",
    "pace": "TTFT predictor",
    "patience": "HealthPolicy",
    "persistence": "RetryPolicy",
    "postpone": "preempt",
    "postponed": "preempted",
    "processor": "CPU",
    "relay": "NextStage",
    "reusable": "RequestStatus",
    "spoil": "non_finite",
    "spoilt": "non_finite",
    "surroundings": "dependencies",
    "teaching": "training",
    "verdict": "RouteDecision",
    "verdicts": "RouteDecision",
    "whoever": "a noun",
    "workplace": "run directory",
}
# Whole names that no class, function, module or configuration field may have.
NAMES = {
    "apart": "split",
    "around": "dependencies",
    "begun": "started",
    "door": "in-flight tracker",
    "filling": "padding",
    "floats": "as_float32",
    "follows": "predecessor",
    "front": "BatchSource",
    "groups": "num_micro_batches",
    "known": "activation cache",
    "leads": "successor",
    "numbers": "as_bits",
    "opened": "RequestStatus",
    "pages": "huge-page arena",
    "part": "loaded stage, micro-batch, key tile",
    "past_worth_a_token": "attention_cost_per_token",
    "prefill_tokens_beside_decode": "prefill_budget_while_decoding",
    "prompts_together": "max_num_batched_tokens",
    "sent": "to_device_async",
    "team": "thread pool",
    "told_when_gone": "on_unavailable",
    "took": "record",
    "turns": "layer barrier",
    "watch": "drift monitor",
}
# The same words are the field's own in these places.
ALLOWED = {
    ("stitch_server/cpu/", "ahead"),  # prefetch distance
    ("stitch_server/cpu/", "lane"),  # of a SIMD register
    ("stitch_server/cpu/", "lanes"),
    ("router_gateway/", "turns"),  # of a conversation
    ("stitch_training/", "turns"),
    ("stitch_training/", "agreement"),  # top-1 agreement of a stitched with the bottom model
    ("router_gateway/routing/", "deferred"),  # DeferredDecision
}
# What no text in the code may say: log lines, errors, metric help texts, docstrings, comments.
PHRASES = re.compile(
    r"\b(spoilt|dearest|dearer|verdicts?|judgements?|so many|begin anew|begins anew|began anew|the past|crowds?|"
    r"surroundings|told when gone|whoever|bury|buried|intake|postponed?|lets? nobody in)\b",
    re.IGNORECASE,
)


def sources() -> list[Path]:
    return sorted(
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "_pb2" not in path.name and "__pycache__" not in path.parts
    )


def words_of(name: str) -> list[str]:
    """`FirstStage` and `first_stage` are both first, stage."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name.replace("_", " "))


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """The module's own name, its classes, functions and the fields of its classes, with their lines."""
    yield 1, path.parent.name if path.stem == "__init__" else path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.lineno, field.target.id


def texts_in(path: Path) -> Iterator[tuple[int, str]]:
    """Strings and comments, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], token.string


def is_allowed(place: str, word: str) -> bool:
    return any(place.startswith(prefix) and word == allowed for prefix, allowed in ALLOWED)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_contain_no_forbidden_word(folder: str) -> None:
    found = []
    for path in sources():
        place = str(path.relative_to(ROOT))
        if not place.startswith(f"{folder}/"):
            continue
        for line, name in names_in(path):
            lowered = name.lower().strip("_")
            for word in {word.lower() for word in words_of(name)} & WORDS.keys():
                if not is_allowed(place, word):
                    found.append(f"{place}:{line}: {name}: {WORDS[word]}")
            if lowered in NAMES and not is_allowed(place, lowered):
                found.append(f"{place}:{line}: {name}: {NAMES[lowered]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", [*FOLDERS, "protos", "deploy"])
def test_texts_contain_no_forbidden_phrase(folder: str) -> None:
    found = []
    for path in sources():
        place = str(path.relative_to(ROOT))
        if place.startswith(f"{folder}/"):
            found += [f"{place}:{line}: {text[:100]}" for line, text in texts_in(path) if PHRASES.search(text)]
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in {".proto", ".toml", ".yaml", ".yml", ".service", ".json"} and "results" not in path.parts:
            lines = enumerate(path.read_text().splitlines(), start=1)
            found += [f"{path.relative_to(ROOT)}:{number}: {line}" for number, line in lines if PHRASES.search(line)]
    assert not found, "\n".join(found)


def test_name_is_split_into_its_words() -> None:
    assert words_of("TTFTPredictor_of2") == ["TTFT", "Predictor", "of", "2"]
    assert words_of("max_num_batched_tokens") == ["max", "num", "batched", "tokens"]
