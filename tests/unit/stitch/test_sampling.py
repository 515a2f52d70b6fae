"""Sampling parameters: defaults, limits, and conversion to proto and back."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from stitch.errors import InvalidRequest
from stitch.sampling import DEFAULT_MAX_TOKENS, MAX_BIASED_TOKENS, MAX_LOGPROBS, Sampling
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
        logit_bias=((3, -100.0), (8, 2.5)),
        min_tokens=6,
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
        ("min_tokens", DEFAULT_MAX_TOKENS + 1),
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
        ("min_tokens", DEFAULT_MAX_TOKENS),
    ],
)
def test_from_proto_accepts_limit(field: str, value: float) -> None:
    message = inference_pb2.Sampling()
    setattr(message, field, value)
    assert getattr(Sampling.from_proto(message), field) == value


@pytest.mark.parametrize("bias", [-100.5, 100.5, math.nan, math.inf])
def test_from_proto_names_token_whose_bias_is_outside_limits(bias: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling.from_proto(inference_pb2.Sampling(logit_bias={4: 100.0, 7: bias}))
    assert caught.value.field == "sampling.logit_bias[7]"


def test_from_proto_refuses_more_biases_than_the_limit() -> None:
    Sampling.from_proto(inference_pb2.Sampling(logit_bias=dict.fromkeys(range(MAX_BIASED_TOKENS), 1.0)))
    with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias is '1,025 entries', but it holds at most 1,024"):
        Sampling.from_proto(inference_pb2.Sampling(logit_bias=dict.fromkeys(range(MAX_BIASED_TOKENS + 1), 1.0)))


def test_first_answer_has_the_seed_of_the_request_and_each_other_one_its_own() -> None:
    sampling = Sampling(seed=5, temperature=1.0)
    assert sampling.of_answer(0) == sampling
    seeds = {Sampling(seed=seed).of_answer(index).seed for seed in range(8) for index in range(16)}
    assert len(seeds) == 8 * 16
    assert max(seeds) < 1 << 64


def test_end_token_ends_an_answer_after_its_least_number_of_tokens() -> None:
    sampling = Sampling(stop_token_ids=(2,), min_tokens=3)
    assert [sampling.ends_at(2, generated) for generated in (1, 3, 4)] == [False, False, True]
    assert not sampling.ends_at(1, 4)


def test_temperature_zero_is_greedy() -> None:
    assert Sampling().greedy
    assert not Sampling(temperature=0.1).greedy


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_sets_penalizes(field: str) -> None:
    assert not Sampling().penalizes
    assert Sampling(**{field: 1.5}).penalizes  # type: ignore[arg-type]
