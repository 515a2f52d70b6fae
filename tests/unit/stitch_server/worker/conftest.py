"""Fixtures: two runners in a chain, of two model families and as on a GPU."""

from __future__ import annotations

import pytest

from tests.support.runner_chain import Chain, Halves, load
from tests.support.tiny_model import write_tiny_pair


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama as on a GPU"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    family, *where = request.param.split(maxsplit=1)
    folder = tmp_path_factory.mktemp(family)
    return load(write_tiny_pair(folder, family), folder, as_on_a_gpu=bool(where))


@pytest.fixture
def chain(loaded: Halves) -> Chain:
    return Chain(loaded)
