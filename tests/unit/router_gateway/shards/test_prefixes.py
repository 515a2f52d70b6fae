"""The chains that have computed the leading tokens of a prompt."""

from __future__ import annotations

import pytest

from router_gateway.shards import prefixes
from router_gateway.shards.prefixes import Prefixes

PROMPT = list(range(100))
CHAIN = ("bottom-0", "top-1")


def test_continued_prompt_finds_the_chain_of_its_prefix() -> None:
    known = Prefixes()
    known.record("a", "weak", PROMPT, CHAIN)
    assert known.computed("a", "weak", [*PROMPT, 7, 8]) == {("bottom-0",): 96, CHAIN: 96}


def test_prompt_finds_as_much_as_it_has_in_common() -> None:
    known = Prefixes()
    known.record("a", "weak", PROMPT, CHAIN)
    assert known.computed("a", "weak", [*PROMPT[:40], *range(1_000, 1_060)])[CHAIN] == 32


@pytest.mark.parametrize(("tenant", "route"), [("b", "weak"), ("a", "strong")])
def test_other_tenant_and_other_route_find_nothing(tenant: str, route: str) -> None:
    known = Prefixes()
    known.record("a", "weak", PROMPT, CHAIN)
    assert known.computed(tenant, route, PROMPT) == {}


def test_other_prompt_and_short_prompt_find_nothing() -> None:
    known = Prefixes()
    known.record("a", "weak", PROMPT, CHAIN)
    known.record("a", "weak", PROMPT[:16], CHAIN)
    assert known.computed("a", "weak", PROMPT[1:]) == {}
    assert known.computed("a", "weak", PROMPT[:16]) == {}


def test_each_chain_has_its_own_length() -> None:
    known = Prefixes()
    known.record("a", "weak", PROMPT, ("bottom-0", "top-0"))
    known.record("a", "weak", PROMPT[:50], ("bottom-1", "top-0"))
    found = known.computed("a", "weak", PROMPT)
    assert (found["bottom-0",], found["bottom-1",]) == (96, 48)
    assert (found["bottom-0", "top-0"], found["bottom-1", "top-0"]) == (96, 48)


def test_oldest_prefixes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_PREFIXES", 2)
    known = Prefixes()
    for first in range(3):
        known.record("a", "weak", [first] * 17, CHAIN)
    found = [bool(known.computed("a", "weak", [first] * 17)) for first in range(3)]
    assert found == [False, True, True]


def test_latest_chains_of_a_prefix_are_kept() -> None:
    known = Prefixes()
    for number in range(prefixes.MAX_CHAINS + 1):
        known.record("a", "weak", PROMPT, (f"bottom-{number}",))
    assert set(known.computed("a", "weak", PROMPT)) == {(f"bottom-{number}",) for number in range(1, 9)}


def test_long_prompt_has_few_prefixes() -> None:
    known = Prefixes()
    known.record("a", "weak", [0] * 32_768, CHAIN)
    assert len(known._chains) < 70
