"""A gateway without a model for every test that asks one. Knows no test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_gateway import FakeGateway, serving


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as fake:
        yield fake
