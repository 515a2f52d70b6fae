"""Functions of Python's standard library to be written from their signatures and docstrings, tested by their doctests.

A function is taken if it is short and all its examples pass in the sandbox with the library's own code, so what needs
files, processes or a network is left out. The set depends on the Python that runs; the report names it.
"""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

from stitch_training.sandbox import DoctestedFunction, check_platform, passes

# Lines after the docstring.
MOST_LINES = 25
_PROMPT = "Complete this Python function. Answer with the whole function in one block of code."
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
# Its import opens a web browser.
_SKIPPED_MODULES = {"antigravity"}
_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def find_functions(limit: int) -> list[DoctestedFunction]:
    """Returns `limit` functions, of all modules in turn; fewer where there are no more.

    Raises InvalidRequest where there is no sandbox for this machine.
    """
    check_platform()
    by_module = [list(functions) for functions in _candidates()]
    in_turn = (one for one in chain.from_iterable(zip_longest(*by_module)) if one is not None)
    return list(islice((one for one in in_turn if passes(one, None) and tests_code(one)), limit))


def tests_code(function: DoctestedFunction) -> bool:
    """Whether the function's examples fail where it returns nothing; else they test nothing."""
    return not passes(function, f"def {function.name}(*given, **named):\n    return None\n")


def prompt_of(function: DoctestedFunction) -> str:
    """Returns the task for a model: the definition and its docstring, nothing of the code."""
    return f"{_PROMPT}\n\n```python\n{function.header}\n```"


def code_of(answer: str, function: DoctestedFunction) -> str | None:
    """Returns the code in an answer: the first block that defines the function, or all of it; None: there is none."""
    definition = f"def {function.name}("
    return next((text for text in (*_BLOCK.findall(answer), answer) if definition in text), None)


def is_correct(answer: str, function: DoctestedFunction) -> bool:
    """Whether the code in an answer passes the function's examples, in the sandbox."""
    code = code_of(answer, function)
    return code is not None and passes(function, code)


def _candidates() -> Iterator[Iterator[DoctestedFunction]]:
    library = Path(ast.__file__).parent
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not _SKIPPED & set(parts) and module not in _SKIPPED_MODULES and parts[-1] != "__main__":
            yield _functions_in(module, path)


def _functions_in(module: str, path: Path) -> Iterator[DoctestedFunction]:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        body = ast.parse(source).body if ">>>" in source else []
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            doc, first = ast.get_docstring(node), node.body[0]
            is_short = (node.end_lineno or 0) - (first.end_lineno or 0) <= MOST_LINES
            if doc and is_short and _has_examples(doc):
                header = "\n".join(lines[node.lineno - 1 : first.end_lineno])
                yield DoctestedFunction(module, node.name, header, doc)


def _has_examples(doc: str) -> bool:
    try:
        examples = doctest.DocTestParser().get_examples(doc)
    except ValueError:
        return False
    return any(one.want and not one.options.get(doctest.SKIP) for one in examples)
