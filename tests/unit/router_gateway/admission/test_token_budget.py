"""Tests of a tenant's tokens a minute."""

from __future__ import annotations

import pytest

from router_gateway.admission.token_budget import TokenBudget


@pytest.fixture
def budget() -> TokenBudget:
    return TokenBudget()


def test_one_minutes_tokens_can_be_taken_at_once(budget: TokenBudget) -> None:
    assert budget.seconds_until(600, 600, 10.0) == 0
    budget.take(600, 600, 10.0)
    assert budget.seconds_until(1, 600, 10.0) == pytest.approx(0.1)


def test_budget_refills_steadily_up_to_its_limit(budget: TokenBudget) -> None:
    budget.take(600, 600, 0.0)
    assert budget.seconds_until(300, 600, 20.0) == pytest.approx(10.0)
    assert budget.seconds_until(600, 600, 500.0) == 0
    assert budget.seconds_until(700, 600, 500.0) == pytest.approx(10.0)


def test_tokens_that_were_not_needed_are_given_back(budget: TokenBudget) -> None:
    budget.take(600, 600, 0.0)
    budget.take(-500, 600, 0.0)
    assert budget.seconds_until(500, 600, 0.0) == 0


def test_lower_limit_holds_at_once(budget: TokenBudget) -> None:
    budget.take(100, 600, 0.0)
    assert budget.seconds_until(60, 60, 0.0) == pytest.approx(100.0)
