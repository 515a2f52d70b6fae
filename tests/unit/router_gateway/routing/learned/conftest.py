"""Fixtures: a learned router of two routes whose model has weights for two words."""

from __future__ import annotations

import numpy as np
import pytest

from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of
from router_gateway.routing.learned.model import LearnedModel
from tests.support.word_model import word_model


@pytest.fixture
def model() -> LearnedModel:
    return word_model({"prove": 0.5, "hello": -0.25})


@pytest.fixture
def artifact(model: LearnedModel) -> RouterArtifact:
    percentiles = tuple(np.linspace(-0.25, 0.5, 101).tolist())
    return RouterArtifact(model, (0.1,), percentiles, {"data": []}, fingerprint_of(model))
