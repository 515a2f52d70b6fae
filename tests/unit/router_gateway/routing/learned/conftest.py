"""A router of two routes that knows two words."""

from __future__ import annotations

import numpy as np
import pytest

from router_gateway.routing.learned.artifact import TextArtefact, fingerprint_of
from router_gateway.routing.learned.model import TextModel
from tests.support.word_model import word_model


@pytest.fixture
def model() -> TextModel:
    return word_model({"prove": 0.5, "hello": -0.25})


@pytest.fixture
def artefact(model: TextModel) -> TextArtefact:
    percentiles = tuple(np.linspace(-0.25, 0.5, 101).tolist())
    return TextArtefact(model, (0.1,), percentiles, {"data": []}, fingerprint_of(model))
