"""A constraint forbids what its grammar does not allow next, whatever its session has been through."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from stitch.grammar import Grammar, GrammarCompiler, InvalidGrammar
from stitch.sampling import Sampling
from stitch_server.model.constraint import Constraint, Constraints, Forbidden, Masks
from stitch_server.model.sampler import SampleRequest, sample
from tests.support.byte_tokenizer import byte_tokenizer, tokens

TOKENS = byte_tokenizer().get_vocab_size()
END, OTHER_END = 2, 0
JSON = Grammar("json_schema", json.dumps({"enum": [12, 125]}))


def constraints(logits: int = TOKENS) -> Constraints:
    return Constraints(GrammarCompiler(byte_tokenizer().to_str, logits), logits)


def forbidden(constraint: Constraint) -> Forbidden:
    constraint.compiled.result()
    mask = constraint.forbidden()
    assert isinstance(mask, np.ndarray)
    return mask


def allowed(constraint: Constraint) -> set[str]:
    names = [byte_tokenizer().id_to_token(int(id)) for id in np.flatnonzero(~forbidden(constraint))]
    assert None not in names
    return set(names)


def test_end_token_is_allowed_where_the_grammar_may_end() -> None:
    constraint = constraints()(JSON, [], [END])
    for text, expected in [("", {"1"}), ("1", {"2"}), ("2", {"5", "<|im_end|>"}), ("5", {"<|im_end|>"})]:
        for token in tokens(text):
            constraint.accept(token)
        assert allowed(constraint) == expected


def test_every_stop_token_ends_only_a_whole_answer() -> None:
    comma = tokens(",")[0]
    constraint = constraints()(Grammar("regex", "a,b?"), tokens("a"), [END, OTHER_END, comma])
    # Also where the grammar allows it as text: there is nothing else, so the answer can't go on.
    assert isinstance(constraint.compiled.result() and constraint.forbidden(), InvalidGrammar)
    constraint = constraints()(Grammar("regex", "a,b?"), tokens("a,"), [END, OTHER_END, comma])
    assert allowed(constraint) == {"b", "<|im_end|>", "<|endoftext|>", ","}


def test_grammar_whose_mask_takes_too_long_ends_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = constraints()(JSON, [], [END])
    constraint.compiled.result()
    monkeypatch.setattr("stitch_server.model.constraint.MAX_MASK_SECONDS", 0.0)
    mask = constraint.forbidden()
    assert isinstance(mask, InvalidGrammar)
    assert "s of CPU" in str(mask)


def test_session_that_is_opened_again_continues_where_it_was() -> None:
    make = constraints()
    grammar = Grammar("json_schema", json.dumps({"type": "object", "required": ["key"], "properties": {"key": {}}}))
    answer = tokens('{"key": [1, "the fox", null]}')
    going_on = make(grammar, [], [END])
    for count, token in enumerate(answer):
        assert np.array_equal(forbidden(going_on), forbidden(make(grammar, answer[:count], [END])))
        going_on.accept(token)
    assert allowed(going_on) >= {"<|im_end|>"}


@pytest.mark.parametrize("logits", [TOKENS - 7, TOKENS, TOKENS + 1, TOKENS + 50])
def test_mask_has_the_size_of_the_logits_and_forbids_padding(logits: int) -> None:
    mask = forbidden(constraints(logits)(Grammar("regex", "(.|\n)*"), [], [END, TOKENS + 100]))
    assert mask.shape == (logits,)
    assert mask[TOKENS:].all()
    assert not mask[END]
    assert mask[OTHER_END]


@pytest.mark.parametrize(
    ("grammar", "generated"), [(Grammar("regex", "a("), []), (JSON, tokens("7")), (Grammar("lark", "start: <[1]>"), [])]
)
def test_constraint_that_can_not_continue_says_why(grammar: Grammar, generated: Sequence[int]) -> None:
    logits = 1 if grammar.kind == "lark" else TOKENS
    constraint = constraints(logits)(grammar, generated, [])
    assert isinstance(constraint.compiled.exception() or constraint.forbidden(), InvalidGrammar)
    assert isinstance(constraint.forbidden(), InvalidGrammar)


def test_pass_does_not_wait_for_a_grammar_that_compiles_for_long() -> None:
    held, make = threading.Event(), constraints()
    blocked = make._compiling.submit(held.wait)
    try:
        late = make(JSON, [], [END])
        ready = constraints()(JSON, [], [END])
        ready.compiled.result()
        first, second = Masks().begin([late, ready]).result()
        assert first is None
        assert isinstance(second, np.ndarray)
    finally:
        held.set()
    blocked.result()
    assert allowed(late) == {"1"}


class TestSampling:
    def request(self, mask: Forbidden | None, position: int = 5, **sampling: object) -> SampleRequest:
        given = replace(Sampling(), **sampling)  # type: ignore[arg-type]
        return SampleRequest(given, position, [1, 2, 3], 3, mask)

    def mask(self, *ids: int) -> Forbidden:
        mask = np.ones(50, bool)
        mask[list(ids)] = False
        return mask

    @pytest.mark.parametrize(
        "sampling",
        [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 2.0, "top_k": 40},
         {"repetition_penalty": 1.3}, {"temperature": 0.7, "presence_penalty": 1.0, "min_p": 0.1}],
    )  # fmt: skip
    def test_only_allowed_tokens_are_chosen(self, sampling: dict[str, float]) -> None:
        rows = 5 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
        masks = [self.mask(row % 50, (row * 7) % 50, (row * 11 + 3) % 50) for row in range(40)]
        requests = [self.request(mask, 5 + row, **sampling) for row, mask in enumerate(masks)]
        chosen = sample(rows.clone(), requests)
        assert all(not mask[token.id] for mask, token in zip(masks, chosen, strict=True))
        assert len({token.id for token in chosen}) > 10

    def test_row_beside_one_with_a_grammar_is_chosen_as_without(self) -> None:
        rows = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
        plain, constrained = sample(rows.clone(), [self.request(None), self.request(self.mask(7))])
        assert (plain.id, constrained.id) == (int(rows[0].argmax()), 7)

    def test_log_probabilities_are_those_of_the_model(self) -> None:
        row = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
        (token,) = sample(row.clone(), [self.request(self.mask(7), logprobs=2)])
        assert token.logprobs is not None
        expected = row[0].log_softmax(0)
        assert token.logprobs.logprob == pytest.approx(float(expected[7]))
        assert token.logprobs.alternatives[0] == (int(expected.argmax()), pytest.approx(float(expected.max())))
