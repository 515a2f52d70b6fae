"""Flags become fields of a request."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from stitch.cli.arguments import add_generation, duration, lengths, output_file, positive, request_fields, token_bias
from stitch.client.messages import generate_request
from stitch.v1 import inference_pb2


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_generation(parser)
    return parser.parse_args(arguments)


def test_request_fields_omits_flags_not_given() -> None:
    assert request_fields(parsed()) == {}


def test_request_fields_keeps_zero() -> None:
    assert request_fields(parsed("--temperature", "0", "--logprobs", "0")) == {"temperature": 0.0, "logprobs": 0}


def test_request_fields_has_every_flag() -> None:
    fields = request_fields(
        parsed(
            *("--route", "weak", "--max-tokens", "3", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.9"),
            *("--min-p", "0.1", "--repetition-penalty", "1.1", "--presence-penalty", "-1", "--frequency-penalty", "1"),
            *("--max-ttft-seconds", "0.5", "--max-cost", "0.9", "--min-quality", "-0.5"),
            *("--seed", "7", "--logprobs", "2", "--stop", "a", "--stop", "b", "--stop-token-id", "5", "--ignore-eos"),
            *("--logit-bias", "42=-1.5", "--logit-bias", "7=2", "--min-tokens", "2", "--n", "3", "--threshold", "0.5"),
            *("--forced-token-id", "8", "--forced-token-id", "9", "--forced-answer", "so"),
        )
    )
    request = generate_request({"prompt": "x", **fields})
    assert request.route == "weak"
    assert list(request.stop) == ["a", "b"]
    assert (dict(request.sampling.logit_bias), request.n, request.threshold) == ({42: -1.5, 7: 2.0}, 3, 0.5)
    assert (list(request.sampling.forced_token_ids), request.forced_answer) == ([8, 9], "so")
    assert {field.name for field, _ in request.sampling.ListFields()} == set(
        inference_pb2.Sampling.DESCRIPTOR.fields_by_name
    )
    assert request.objectives == inference_pb2.Objectives(max_ttft_seconds=0.5, max_cost=0.9, min_quality=-0.5)


@pytest.mark.parametrize("text", ["42", "42=", "=1", "x=1", "42=x", "-1=1"])
def test_token_bias_needs_an_id_and_a_number(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        token_bias(text)


def test_lengths_are_sorted_and_distinct() -> None:
    assert lengths("64,32,64") == (32, 64)


@pytest.mark.parametrize("text", ["32", "32,32", "0,32"])
def test_lengths_refuses_fewer_than_two(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        lengths(text)


def test_positive_refuses_zero() -> None:
    assert positive("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not at least 1"):
        positive("0")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "-inf", "soon"])
def test_duration_refuses_what_is_not_above_0(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        duration(text)


def test_duration_may_be_infinite() -> None:
    assert (duration("0.5"), duration("inf")) == (0.5, float("inf"))


def test_output_file_may_be_new_in_new_folders_or_a_device(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    for text in (str(tmp_path / "old"), str(tmp_path / "new" / "folder" / "file"), "file", "/dev/stdout"):
        assert output_file(text) == text


@pytest.mark.parametrize(("name", "reason"), [("", "is a folder"), ("new/", "is a folder"), ("old/new", "can't be")])
def test_output_file_that_can_not_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        output_file(f"{tmp_path}/{name}")
