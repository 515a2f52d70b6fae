"""Answers of a whole chain match their grammars, sampled or not, and also where they start again."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from stitch.cluster import load_cluster
from stitch.errors import OutOfStep
from stitch.grammar import Grammar
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.request import Request, RequestOutput
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.engine_fakes import new_request
from tests.support.in_process import ChainInProcess
from tests.support.json_schemas import SCHEMAS
from tests.support.tiny_cluster import write_tiny_cluster

END = 2


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> ChainInProcess:
    # Of a head with fewer rows than the model's vocabulary, which is padded.
    return ChainInProcess(load_cluster(str(write_tiny_cluster(tmp_path_factory.mktemp("grammars")))))


def request(grammar: Grammar, seed: int = 0, prompt: int = 5, **fields: Any) -> tuple[Request, list[RequestOutput]]:
    outputs: list[RequestOutput] = []
    given = {"stop_token_ids": (END,), "temperature": 1.0, "max_tokens": 100} | fields
    asked = new_request(prompt, "strong", chain=("top-0",), outputs=outputs, first_token=5, seed=seed, **given)
    asked.grammar = grammar
    return asked, outputs


def run(chain: ChainInProcess, asked: Sequence[tuple[Request, list[RequestOutput]]]) -> None:
    """Until all requests have ended."""
    first = chain.shards["bottom-0"].first_stage
    assert first is not None
    for one, _ in asked:
        first.admit(one)
    while not all(is_finished(outputs) for _, outputs in asked):
        for shard in chain.shards.values():
            shard.engine.step()
    assert chain.idle


def is_finished(outputs: Sequence[RequestOutput]) -> bool:
    return bool(outputs) and (outputs[-1].finish_reason is not None or outputs[-1].error is not None)


def ids_of(outputs: Sequence[RequestOutput]) -> list[int]:
    if outputs[-1].error is not None:
        raise outputs[-1].error
    return [output.token.id for output in outputs if output.token is not None]


def text_of(outputs: Sequence[RequestOutput]) -> str:
    return str(byte_tokenizer().decode([id for id in ids_of(outputs) if id != END], skip_special_tokens=False))


@pytest.mark.parametrize("answers", [1, pytest.param(10, marks=pytest.mark.full)])
def test_answers_that_end_by_themselves_validate(chain: ChainInProcess, answers: int) -> None:
    grammars = [Grammar("json_schema", json.dumps(schema)) for schema in SCHEMAS]
    # Together with ones that have no grammar.
    free = [request(grammars[0], seed=seed) for seed in range(3)]
    for one, _ in free:
        one.grammar = None
    asked = [request(grammar, seed=seed) for seed in range(answers) for grammar in grammars]
    run(chain, [*free, *asked])
    ended = 0
    for (_, outputs), schema in zip(asked, SCHEMAS * answers, strict=True):
        if outputs[-1].finish_reason == FINISH_REASON_STOP:
            ended += 1
            assert jsonschema_rs.validator_for(schema).is_valid(json.loads(text_of(outputs))), (
                schema,
                text_of(outputs),
            )
        else:
            assert outputs[-1].finish_reason == FINISH_REASON_LENGTH
    assert ended >= 0.8 * len(asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_that_starts_again_goes_on_with_the_same_tokens(chain: ChainInProcess, temperature: float) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS[7]))
    whole = request(grammar, temperature=temperature)
    run(chain, [whole])
    ids = ids_of(whole[1])
    again = []
    for cut in range(1, len(ids)):
        one = request(grammar, temperature=temperature)
        one[0].token_ids += ids[:cut]
        again.append(one)
    run(chain, again)
    assert [ids[:cut] + ids_of(outputs) for cut, (_, outputs) in enumerate(again, 1)] == [ids] * len(again)


def test_length_cuts_an_object(chain: ChainInProcess) -> None:
    asked = request(Grammar("json_schema", json.dumps(SCHEMAS[1])), max_tokens=5)
    run(chain, [asked])
    assert asked[1][-1].finish_reason == FINISH_REASON_LENGTH
    assert len(ids_of(asked[1])) == 5


def test_answer_waits_for_its_grammar_and_others_go_on(chain: ChainInProcess) -> None:
    grammar, other = Grammar("regex", "[a-z]{3}é"), Grammar("regex", "x{9}")
    stage = chain.shards["top-0"].next_stage
    assert stage is not None
    run(chain, [request(other)])
    constraints: Any = stage._sessions._constrain
    held = threading.Event()
    free, late = request(other, max_tokens=30), request(grammar, prompt=40)
    free[0].grammar = None
    free[0].sampling = free[0].sampling.__class__(max_tokens=30, ignore_eos=True)
    blocked = constraints._compiling.submit(held.wait)
    first = chain.shards["bottom-0"].first_stage
    assert first is not None
    try:
        for one in (free, late):
            first.admit(one[0])
        while not is_finished(free[1]) or late[0].epoch < 2:
            for shard in chain.shards.values():
                shard.engine.step()
        assert len(ids_of(free[1])) == 30
        assert not late[1]
    finally:
        held.set()
    blocked.result()
    while not is_finished(late[1]):
        for shard in chain.shards.values():
            shard.engine.step()
    text = text_of(late[1])
    assert len(text) == 4
    assert text.endswith("é")
    assert chain.idle


@pytest.mark.parametrize(
    ("grammar", "generated"), [(Grammar("regex", "a("), []), (Grammar("regex", "abc"), [300, 301])]
)
def test_session_whose_grammar_fails_ends_alone(chain: ChainInProcess, grammar: Grammar, generated: list[int]) -> None:
    failing, other = request(grammar), request(Grammar("regex", "xyz"))
    failing[0].token_ids += generated
    run(chain, [failing, other])
    with pytest.raises(OutOfStep, match="the grammar fails"):
        ids_of(failing[1])
    assert text_of(other[1]) == "xyz"


def test_grammar_passes_through_the_shards_of_a_deep_chain(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path, bottoms=[(0, 2), (2, 4)], tops=[(2, 3), (3, 4)])
    deep, outputs = ChainInProcess(load_cluster(str(file))), list[RequestOutput]()
    asked = new_request(5, "weak", chain=("bottom-1", "top-0", "top-1"), outputs=outputs, first_token=5, max_tokens=9)
    asked.grammar = Grammar("regex", "[0-9]{9}")
    run(deep, [(asked, outputs)])
    assert text_of(outputs).isdecimal()
