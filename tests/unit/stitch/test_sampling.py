"""Sampling parameters: defaults, limits, and conversion to proto and back."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from stitch.errors import InvalidRequest
from stitch.sampling import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, Sampling
from stitch.v1 import inference_pb2


def test_from_proto_fills_in_defaults() -> None:
    assert Sampling.from_proto(inference_pb2.Sampling()) == Sampling()
    assert Sampling().max_tokens == DEFAULT_MAX_TOKENS


def test_from_proto_keeps_zero() -> None:
    message = inference_pb2.Sampling(top_p=0.5, repetition_penalty=1.5, logprobs=0)
    found = Sampling.from_proto(message)
    assert (found.top_p, found.repetition_penalty, found.logprobs) == (0.5, 1.5, 0)


def test_every_field_survives_proto_round_trip() -> None:
    sampling = Sampling(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        seed=9,
        max_tokens=7,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=3,
        forced_token_ids=(4, 5, 4),
    )
    assert all(getattr(sampling, field.name) != getattr(Sampling(), field.name) for field in fields(Sampling))
    assert Sampling.from_proto(sampling.to_proto()) == sampling


def test_proto_message_has_no_other_fields() -> None:
    assert set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name) == {field.name for field in fields(Sampling)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("logprobs", MAX_LOGPROBS + 1),
    ],
)
def test_from_proto_names_field_outside_limits(field: str, value: float) -> None:
    message = inference_pb2.Sampling()
    setattr(message, field, value)
    with pytest.raises(InvalidRequest) as caught:
        Sampling.from_proto(message)
    assert caught.value.field == f"sampling.{field}"
    assert "it must be" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 10.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("max_tokens", 1),
        ("logprobs", MAX_LOGPROBS),
    ],
)
def test_from_proto_accepts_limit(field: str, value: float) -> None:
    message = inference_pb2.Sampling()
    setattr(message, field, value)
    assert getattr(Sampling.from_proto(message), field) == value


def test_temperature_zero_is_greedy() -> None:
    assert Sampling().greedy
    assert not Sampling(temperature=0.1).greedy


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_sets_penalizes(field: str) -> None:
    assert not Sampling().penalizes
    assert Sampling(**{field: 1.5}).penalizes  # type: ignore[arg-type]
