"""Writes prompts of three kinds with known answers, for `stitch-train label`.

    python benchmarks/quality/known_answers.py --out DIR --questions FILE.jsonl.gz --code FILE.jsonl.gz

`questions.jsonl` has rows of a question set with their gold answers. `functions.jsonl` has functions with doctests:
those of Python's standard library, and the prompts of a file that are one function with examples in its docstring.
`short.jsonl` has questions in one line whose answers this program computes or has in a table: arithmetic, expressions
of Python, letters of a word, days of the week, capitals, and kinds of things. The rows are drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stitch_training.functions import find_functions, prompt_of, tests_code
from stitch_training.sandbox import DoctestedFunction

Draw = random.Random
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CAPITALS = """
Austria Vienna, Peru Lima, Kenya Nairobi, Norway Oslo, Egypt Cairo, Cuba Havana, Portugal Lisbon, Ireland Dublin,
Greece Athens, Poland Warsaw, Hungary Budapest, Canada Ottawa, Chile Santiago, Ghana Accra, Senegal Dakar,
Nepal Kathmandu, Mongolia Ulaanbaatar, Bhutan Thimphu, Latvia Riga, Estonia Tallinn, Serbia Belgrade, Bulgaria Sofia,
Albania Tirana, Zambia Lusaka, Uganda Kampala, Jordan Amman, Lebanon Beirut, Oman Muscat, Laos Vientiane, Fiji Suva,
Uruguay Montevideo, Ecuador Quito, Jamaica Kingston, Iceland Reykjavik, Malta Valletta, Armenia Yerevan
"""
_KINDS = {
    "animal": ("otter", "heron", "badger", "newt", "gecko", "lynx", "moth", "carp", "toad"),
    "plant": ("fern", "birch", "clover", "moss", "thistle", "ivy", "cedar", "lavender", "nettle"),
    "tool": ("chisel", "pliers", "spanner", "rasp", "trowel", "mallet", "awl", "hacksaw", "clamp"),
    "instrument": ("oboe", "cello", "lute", "bassoon", "zither", "viola", "harp", "tuba", "banjo"),
}
_WORDS = ("strawberry", "mississippi", "committee", "banana", "parallel", "bookkeeper", "assessment", "accommodation")


def arithmetic(draw: Draw) -> tuple[str, str]:
    """Returns a sum, a difference or a product of numbers of one to four digits, and its value."""
    sign, digits = draw.choice("+-*"), draw.randint(1, 4)
    one, other = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    text = f"{one} {sign} {other}"
    return f"What is {text}? Answer with the number alone.", str(eval(text))


def expression(draw: Draw) -> tuple[str, str]:
    """Returns an expression of Python over a list of numbers, and its value."""
    values = [draw.randint(1, 20) for _ in range(draw.randint(3, 7))]
    function = draw.choice(("max({})", "min({})", "sum({})", "len({})", "sorted({})[1]", "{}[-1]", "len(set({}))"))
    text = function.format(values)
    return f"What does the Python expression `{text}` evaluate to? Answer with the number alone.", str(eval(text))


def letters(draw: Draw) -> tuple[str, str]:
    """Returns a question for the number of a letter in a word, and the number."""
    word = draw.choice(_WORDS)
    letter = draw.choice(sorted(set(word)))
    text = f"How many times does the letter {letter!r} occur in {word!r}? Answer with the number alone."
    return text, str(word.count(letter))


def weekday(draw: Draw) -> tuple[str, str]:
    """Returns a question for the day of the week some days later, and the day."""
    first, days = draw.randrange(7), draw.randint(1, 30)
    text = f"Today is {_DAYS[first]}. Which day of the week is it in {days} days? Answer with the day alone."
    return text, _DAYS[(first + days) % 7]


def capital(draw: Draw) -> tuple[str, str]:
    """Returns a question for the capital of a country, and the capital."""
    country, city = draw.choice(_CAPITALS.split(",")).split()
    return f"What is the capital of {country}? Answer with its name alone.", city


def kind(draw: Draw) -> tuple[str, str]:
    """Returns a question for the kind of a thing, and the kind."""
    answer = draw.choice(list(_KINDS))
    word, listed = draw.choice(_KINDS[answer]), ", ".join(_KINDS)
    return f"What kind of thing is {word!r}: {listed}? Answer with one of these words.", answer


SHORT: tuple[Callable[[Draw], tuple[str, str]], ...] = (arithmetic, expression, letters, weekday, capital, kind)


def short_rows(count: int, draw: Draw) -> list[dict[str, Any]]:
    """Returns `count` different short questions, of each sort in turn. Raises ValueError for too many."""
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(100 * count):
        make = SHORT[len(rows) % len(SHORT)]
        prompt, answer = make(draw)
        rows.setdefault(prompt, {"prompt": prompt, "answer": answer, "task": make.__name__})
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"there are no {count} different short questions")


def question_rows(path: Path, count: int, draw: Draw) -> list[dict[str, Any]]:
    """Returns `count` rows of a question set, with `prompt`, `answer` and `task`."""
    rows = [{"prompt": row["question"], "answer": row["answer"], "task": "question"} for row in read_rows(path)]
    return draw.sample(rows, count)


def function_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the functions of the standard library and of a file's prompts, with `prompt`, `doctests` and `task`."""
    in_file = filter(None, (to_function(row["prompt"]) for row in read_rows(path)))
    functions = [*find_functions(1000), *(one for one in in_file if tests_code(one))]
    return [
        {"prompt": prompt_of(one), "doctests": asdict(one), "task": "library" if one.module else "function"}
        for one in functions
    ]


def to_function(prompt: str) -> DoctestedFunction | None:
    """Returns the function that a prompt consists of; None: it is none, or an example has no expected value."""
    try:
        nodes = [node for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)]
        doc = ast.get_docstring(nodes[0]) if len(nodes) == 1 else None
        examples = doctest.DocTestParser().get_examples(doc or "")
    except (SyntaxError, ValueError):
        return None
    if not doc or not examples or not all(one.want for one in examples):
        return None
    return DoctestedFunction(None, nodes[0].name, prompt.rstrip(), doc)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines, plain or gzip."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        yield from map(json.loads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--questions", metavar="FILE", type=Path, required=True, help="rows with question and answer")
    parser.add_argument("--code", metavar="FILE", type=Path, required=True, help="prompts, some of them functions")
    parser.add_argument("--rows", metavar="N", type=int, default=200, help="questions, and short ones; default: 200")
    parsed = parser.parse_args()
    draw = random.Random(0)
    files = {
        "questions": question_rows(parsed.questions, parsed.rows, draw),
        "functions": function_rows(parsed.code),
        "short": short_rows(parsed.rows, draw),
    }
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (parsed.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
