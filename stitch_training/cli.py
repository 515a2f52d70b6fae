"""The command `stitch-train`: makes stitches, probes and routers, offline. Parses, then calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from stitch.environment import prepare_program

if TYPE_CHECKING:
    from stitch_training.data import DataSettings
    from stitch_training.distill import TrainingSettings
    from stitch_training.fit import Control
    from stitch_training.least_squares import CutPoint
    from stitch_training.prompt_runs import GatewayConnection

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
# The exit status of a verb; None: 0.
Call: TypeAlias = Callable[[argparse.Namespace], "int | None"]

_RANGES = (
    ("held_out_percent", 1, 100),
    ("gold_rows", 1, None),
    ("gold_tokens", 1, None),
    ("prompt_rows", 1, None),
    ("prompt_tokens", 1, None),
    ("functions", 0, None),
    ("function_tokens", 1, None),
    ("least_saving", 0, 1),
    ("tokens", 1, None),
    ("held_out_tokens", 1, None),
    ("sequence_tokens", 16, None),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 where the input is invalid, 1 where the cluster, a file or a prompt fails."""
    prepare_program()
    parsed = build_parser().parse_args(arguments)
    # Imported after parsing, so that --help is instant.
    from stitch.errors import Incompatible, InvalidRequest, StitchError

    try:
        status: int = parsed.call(parsed) or 0
    except (StitchError, OSError) as error:
        print(f"stitch-train: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequest | Incompatible) else 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all verbs and their flags."""
    parser = argparse.ArgumentParser(prog="stitch-train", description="Makes stitches, probes and routers.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(verbs)
    _add_sweep(verbs)
    _add_evaluate(verbs)
    _add_probe(verbs)
    _add_answers(verbs)
    _add_label(verbs)
    _add_router(verbs)
    _add_calibrate(verbs)
    return parser


def _add_verb(verbs: Verbs, name: str, purpose: str, call: Call | None) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=purpose, description=purpose)
    if call is not None:
        verb.set_defaults(call=call)
    return verb


def _add_fit(verbs: Verbs) -> None:
    verb = _add_verb(verbs, "fit", "make the stitch of a route: least squares, then distillation", _fit)
    _add_cluster(verb)
    _add_text(verb, tokens=100_000)
    subject = verb.add_mutually_exclusive_group(required=True)
    subject.add_argument("--route", metavar="R", help="the route whose stitch to make")
    subject.add_argument(
        "--control", metavar="MODEL[:K]",
        help="train a whole model, bottom or top: adapters beside all its layers, or with K a map after K of them and"
        " adapters from there on",
    )  # fmt: skip
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    _add_run_dir(verb)
    verb.add_argument(
        "--aim", choices=["states", "answers"], default="states",
        help="of least squares: the top's states, or the bottom's distribution through the top's head; default: states",
    )  # fmt: skip
    verb.add_argument("--epochs", metavar="N", type=int, default=1, help="of distillation; 0: least squares alone")
    verb.add_argument("--learning-rate", metavar="X", type=float, default=1e-3, help="at the start; default: 0.001")
    verb.add_argument(
        "--teacher-share", metavar="X", type=float, default=0.5,
        help="weight of the bottom's distribution against the next token, 0 to 1; default: 0.5",
    )  # fmt: skip
    _add_loss_on(verb, "the next tokens whose loss counts")
    verb.add_argument("--batch-sequences", metavar="N", type=int, default=4, help="in one step; default: 4")
    verb.add_argument(
        "--start", metavar="STITCH", type=Path, help="start from this stitch of the cut, instead of least squares"
    )
    verb.add_argument(
        "--adapter-rank", metavar="N", type=int, default=0,
        help="of adapters beside the top's layers, trained with the stitch; default: 0, none",
    )  # fmt: skip
    verb.add_argument("--evaluations", metavar="N", type=int, default=10, help="of held-out loss; default: 10")
    verb.add_argument(
        "--store", choices=["float32", "bfloat16"], default="float32", help="dtype of the file; default: float32"
    )


def _add_sweep(verbs: Verbs) -> None:
    verb = _add_verb(verbs, "sweep", "compare many cut points by least squares from one pass over the data", _sweep)
    _add_cluster(verb)
    _add_text(verb, tokens=50_000)
    verb.add_argument(
        "--cuts", metavar="K:J,J,…", nargs="+", default=[], help="such as 20:12,14,15 24:17; default: a grid of both"
    )
    verb.add_argument(
        "--least-saving", metavar="X", type=float, default=0.0,
        help="leave out cuts that save less than this share of the bottom's parameters; default: 0",
    )  # fmt: skip
    _add_loss_on(verb, "rank cuts by the divergence over these next tokens")
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .json file; its plot is a .png beside")
    _add_run_dir(verb)


def _add_evaluate(verbs: Verbs) -> None:
    verb = _add_verb(verbs, "evaluate", "measure both models and every route on held-out text", _evaluate)
    _add_cluster(verb)
    _add_text(verb)
    verb.add_argument(
        "--held-out-percent", metavar="P", type=int, default=10,
        help="of documents to measure on; 10 are those that no fit was given, 100 is for files that no fit was given",
    )  # fmt: skip
    verb.add_argument(
        "--prompts", metavar="FILE", nargs="+", type=Path, default=[],
        help="answer those of their prompts that are held out: agreement with the bottom's answers, repetitions",
    )  # fmt: skip
    verb.add_argument("--prompt-rows", metavar="N", type=int, default=40, help="of --prompts; default: 40")
    verb.add_argument("--prompt-tokens", metavar="N", type=int, default=128, help="of an answer; default: 128")
    verb.add_argument(
        "--controls",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="made by `fit --control`, to measure as well",
    )
    verb.add_argument("--gold", metavar="FILE", type=Path, help="questions to ask; each has its `answer`")
    verb.add_argument("--gold-rows", metavar="N", type=int, default=100, help="of --gold; default: 100")
    verb.add_argument("--gold-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    verb.add_argument(
        "--functions", metavar="N", type=int, default=0,
        help="functions of the standard library to write, tested by their doctests in a sandbox; default: 0, none",
    )  # fmt: skip
    verb.add_argument("--function-tokens", metavar="N", type=int, default=384, help="of an answer; default: 384")
    verb.add_argument("--out", metavar="FILE", type=Path, help="a .json file; tables (.md) and plot (.png) are beside")


def _add_probe(verbs: Verbs) -> None:
    verb = _add_verb(verbs, "probe", "train the probe that decides routes within the first shard", _probe)
    _add_cluster(verb)
    _add_labels(verb, "labelled prompts: JSON lines, plain or gzip")
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    verb.add_argument("--tokens", metavar="N", type=int, default=128, help="of a prompt that it reads; default: 128")
    verb.add_argument("--chat", action="store_true", help="prompts are conversations of one turn, not plain text")
    verb.add_argument(
        "--budget", metavar="B", type=float, default=0.5, help="mean cost, 0 (all cheapest) to 1; default: 0.5"
    )
    verb.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")


def _add_label(verbs: Verbs) -> None:
    from stitch.cli.arguments import add_connection

    purpose = "run prompts through the routes of a running cluster and record how good each answer is"
    verb = _add_verb(verbs, "label", purpose, _label)
    verb.add_argument("--gateway", metavar="HOST:PORT", required=True, help="of a running cluster")
    add_connection(verb)
    verb.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON lines: prompt, and answer, doctests or reference",
    )
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="labels; an interrupted run resumes it")
    verb.add_argument("--routes", metavar="NAME,…", help="two or more; default: the cheapest and the costliest")
    verb.add_argument("--max-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    verb.add_argument("--concurrency", metavar="N", type=int, default=8, help="prompts in flight; default: 8")
    verb.add_argument("--plain", action="store_true", help="send prompts as plain text, not as a chat")


def _add_answers(verbs: Verbs) -> None:
    from stitch.cli.arguments import add_connection

    purpose = "make training text of the answers that a route of a running cluster gives to prompts"
    verb = _add_verb(verbs, "answers", purpose, _answers)
    verb.add_argument("--gateway", metavar="HOST:PORT", required=True, help="of a running cluster")
    add_connection(verb)
    verb.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True,
        help="conversations, questions or prompts; those that are held out are left out",
    )  # fmt: skip
    verb.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="chat JSONL; an interrupted run resumes it"
    )
    verb.add_argument("--route", metavar="R", required=True, help="the route that answers")
    verb.add_argument("--prompts", metavar="N", type=int, help="at most N of them, of the files in turn; default: all")
    verb.add_argument("--max-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    verb.add_argument("--temperature", metavar="T", type=float, default=0.7, help="0 is greedy; default: 0.7")
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same answers; default: 0")
    verb.add_argument("--concurrency", metavar="N", type=int, default=8, help="prompts in flight; default: 8")


def _add_router(verbs: Verbs) -> None:
    router = _add_verb(verbs, "router", "train or evaluate the learned router of a gateway", None)
    actions = router.add_subparsers(required=True, metavar="ACTION")
    train = _add_verb(actions, "train", "make a router from labelled prompts", _train_router)
    _add_labels(train, "labelled prompts: JSON lines, plain or gzip; every file is a source with its own expert")
    train.add_argument("--out", metavar="FILE", type=Path, required=True, help="the artifact, a safetensors file")
    train.add_argument("--routes", metavar="NAME,…", default="weak,strong", help="cheapest first; default: %(default)s")
    train.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")
    purpose = "compare a router with chance, prompt length and the best possible"
    evaluate = _add_verb(actions, "evaluate", purpose, _evaluate_router)
    subject = evaluate.add_mutually_exclusive_group(required=True)
    subject.add_argument("--router", metavar="FILE", type=Path, help="the artifact")
    subject.add_argument("--folds", metavar="N", type=int, help="no artifact: a router for each of N folds of the data")
    _add_labels(evaluate, "labelled prompts that the router was not trained on")
    evaluate.add_argument("--routes", metavar="NAME,…", default="weak,strong", help="of --folds; default: %(default)s")
    evaluate.add_argument("--seed", metavar="N", type=int, default=0, help="draws the folds; default: 0")
    evaluate.add_argument("--plot", metavar="FILE", type=Path, help="draw the curves; one file per data file")
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="write all figures")


def _add_calibrate(verbs: Verbs) -> None:
    purpose = "find the thresholds that keep a router or a probe within a budget"
    verb = _add_verb(verbs, "calibrate", purpose, _calibrate)
    artifact = verb.add_mutually_exclusive_group(required=True)
    artifact.add_argument("--router", metavar="FILE", type=Path, help="a learned router's artifact")
    artifact.add_argument("--probe", metavar="FILE", type=Path, help="a probe's artifact; needs --cluster")
    verb.add_argument("--cluster", metavar="CLUSTER", help="the probe's cluster file, or the name of a preset")
    _add_compute(verb)
    purpose = "prompts like those to come, which the training was not given; labels are not needed"
    verb.add_argument("--data", metavar="FILE", type=Path, nargs="+", required=True, help=purpose)
    target = verb.add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", metavar="B", type=float, help="mean cost, 0 (all cheapest) to 1 (all costliest)")
    target.add_argument("--cost", metavar="X", type=float, help="mean cost in the unit of --costs")
    verb.add_argument(
        "--costs", metavar="ROUTE=X", nargs="*", default=[],
        help="what a route costs, such as parameters read per token; default: equal steps",
    )  # fmt: skip
    verb.add_argument("--out", metavar="FILE", type=Path, help="the file of thresholds; default: print them")


def _add_cluster(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    _add_compute(verb)


def _add_compute(verb: argparse.ArgumentParser) -> None:
    kinds = ["float32", "bfloat16"]
    verb.add_argument("--dtype", choices=kinds, default="float32", help="how the models compute; default: float32")
    verb.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads; default: all cores")


def _add_text(verb: argparse.ArgumentParser, tokens: int | None = None) -> None:
    """Adds the flags of text to read; `tokens` is the default number of tokens to fit on, None: nothing is fitted."""
    verb.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True, help="text, JSONL, chat JSONL; .gz too"
    )
    verb.add_argument("--held-out-tokens", metavar="N", type=int, default=8192, help="to measure on; default: 8192")
    verb.add_argument("--sequence-tokens", metavar="N", type=int, default=512, help="in one sequence; default: 512")
    if tokens is not None:
        verb.add_argument("--tokens", metavar="N", type=int, default=tokens, help=f"to fit on; default: {tokens}")
        verb.add_argument(
            "--shares",
            metavar="N",
            nargs="+",
            type=int,
            default=[],
            help="sequences per FILE and round; default: 1",
        )
        verb.add_argument("--seed", metavar="N", type=int, default=0, help="of the order of the data; default: 0")


def _add_loss_on(verb: argparse.ArgumentParser, purpose: str) -> None:
    verb.add_argument(
        "--loss-on", choices=["all", "content", "assistant"], default="content",
        help=f"{purpose}: all, those of texts and messages, or those of answers; default: content",
    )  # fmt: skip


def _add_labels(verb: argparse.ArgumentParser, purpose: str) -> None:
    verb.add_argument("--data", metavar="FILE", type=Path, nargs="+", required=True, help=purpose)
    verb.add_argument(
        "--rename", metavar="NAME=ROUTE", nargs="*", default=[],
        help="the route that a name in the files denotes, such as qwen2.5-7b-instruct=weak",
    )  # fmt: skip


def _add_run_dir(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="kept for resuming and for other fits; default: FILE.run"
    )
    verb.add_argument(
        "--reuse", metavar="DIR", nargs="+", type=Path, default=[],
        help="run directories whose sequences need not run through the bottom model again",
    )  # fmt: skip


def _fit(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.fit import FitSettings, fit, write_fit

    settings = FitSettings(
        cluster=load_cluster(parsed.cluster),
        subject=parse_control(parsed.control) if parsed.control else parsed.route,
        data=_data_settings(parsed),
        training=_training_settings(parsed),
        dtype=parsed.dtype,
        run_dir=_run_dir(parsed),
        reuse=tuple(parsed.reuse),
        start=parsed.start,
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        write_fit(fit(settings, progress), parsed.out, parsed.store)


def _sweep(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.report import write_json
    from stitch_training.sweep import SweepSettings, sweep

    settings = SweepSettings(
        cluster=load_cluster(parsed.cluster),
        cuts=tuple(cut for text in parsed.cuts for cut in parse_cuts(text)),
        data=_data_settings(parsed),
        dtype=parsed.dtype,
        run_dir=_run_dir(parsed),
        loss_on=parsed.loss_on,
        least_saving=parsed.least_saving,
        reuse=tuple(parsed.reuse),
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        found = sweep(settings, progress)
    ranking = [rung.name for rung in found.ranking()]
    write_json(parsed.out, {**found.description, "ranking": ranking, **found.ladder.as_json()})
    found.ladder.plot(parsed.out.with_suffix(".png"))
    print("\n".join(found.lines()))


def _evaluate(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.answer_quality import AnswerSettings
    from stitch_training.evaluate import EvaluationSettings, evaluate, write_evaluation

    settings = EvaluationSettings(
        cluster=load_cluster(parsed.cluster),
        data=_data_settings(parsed),
        dtype=parsed.dtype,
        held_out_percent=parsed.held_out_percent,
        controls=tuple(parsed.controls),
        answers=AnswerSettings(
            prompts=tuple(parsed.prompts),
            prompt_rows=parsed.prompt_rows,
            prompt_tokens=parsed.prompt_tokens,
            gold=parsed.gold,
            gold_rows=parsed.gold_rows,
            gold_tokens=parsed.gold_tokens,
            functions=parsed.functions,
            function_tokens=parsed.function_tokens,
        ),
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        ladder = evaluate(settings, progress)
    write_evaluation(ladder, settings, parsed.out)


def _probe(parsed: argparse.Namespace) -> None:
    import torch

    from stitch.cli.arguments import named
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.labels import read_labels
    from stitch_training.probe import ProbeSettings, routes_by_cost, train_probe, write_probe

    cluster, dtype = load_cluster(parsed.cluster), getattr(torch, parsed.dtype)
    settings = ProbeSettings(cluster, parsed.tokens, parsed.budget, parsed.folds, dtype, parsed.chat)
    routes, renamed = routes_by_cost(cluster), named(parsed.rename, "rename")
    sets = [read_labels(path, routes, renamed) for path in parsed.data]
    _use_threads(parsed)
    with ProgressLine() as progress:
        write_probe(train_probe(settings, sets, progress), parsed.out)


def _label(parsed: argparse.Namespace) -> int:
    import asyncio

    from stitch_training.labelling import LabellingSettings, label_file

    settings = LabellingSettings(
        connection=_connection(parsed),
        data=parsed.data,
        out=parsed.out,
        routes=tuple(parsed.routes.split(",")) if parsed.routes else (),
        max_tokens=parsed.max_tokens,
        concurrency=parsed.concurrency,
        is_plain=parsed.plain,
    )
    return int(asyncio.run(label_file(settings)).failed > 0)


def _answers(parsed: argparse.Namespace) -> int:
    import asyncio

    from stitch_training.answers import AnswersSettings, make_answers

    settings = AnswersSettings(
        connection=_connection(parsed),
        data=tuple(parsed.data),
        out=parsed.out,
        route=parsed.route,
        prompts=parsed.prompts,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        seed=parsed.seed,
        concurrency=parsed.concurrency,
    )
    return int(asyncio.run(make_answers(settings)).failed > 0)


def _connection(parsed: argparse.Namespace) -> GatewayConnection:
    from stitch.cli.arguments import gateway_key
    from stitch_training.prompt_runs import GatewayConnection

    return GatewayConnection(parsed.gateway, parsed.authority, parsed.proxy, gateway_key(parsed), parsed.certificate)


def _train_router(parsed: argparse.Namespace) -> None:
    from stitch.cli.arguments import named
    from stitch_training.router import train

    renamed = named(parsed.rename, "rename")
    train(parsed.data, parsed.out, tuple(parsed.routes.split(",")), renamed, parsed.folds)


def _evaluate_router(parsed: argparse.Namespace) -> None:
    from stitch.cli.arguments import named
    from stitch_training.router import cross_validate, evaluate

    renamed = named(parsed.rename, "rename")
    if parsed.router is not None:
        evaluate(parsed.router, parsed.data, renamed, parsed.plot, parsed.json)
    else:
        routes = tuple(parsed.routes.split(","))
        cross_validate(parsed.data, routes, renamed, parsed.folds, parsed.seed, parsed.plot, parsed.json)


def _calibrate(parsed: argparse.Namespace) -> None:
    from stitch_training.calibration import calibrate_router

    costs = parse_costs(parsed.costs)
    if parsed.router is not None:
        thresholds, summary = calibrate_router(parsed.router, parsed.data, parsed.budget, parsed.cost, costs)
    else:
        import torch

        from stitch.cluster import load_cluster
        from stitch.errors import InvalidRequest
        from stitch.progress import ProgressLine
        from stitch_training.probe import calibrate_probe

        if parsed.cluster is None:
            raise InvalidRequest("cluster", None, "--probe needs the cluster that it is for")
        _use_threads(parsed)
        cluster, dtype = load_cluster(parsed.cluster), getattr(torch, parsed.dtype)
        with ProgressLine() as progress:
            thresholds, summary = calibrate_probe(
                cluster, parsed.probe, parsed.data, parsed.budget, parsed.cost, costs, dtype, progress
            )
    if parsed.out is None:
        print(thresholds.model_dump_json(indent=1))
    else:
        thresholds.write(parsed.out)
    print(summary, file=sys.stderr)


def parse_cuts(text: str) -> list[CutPoint]:
    """Parses `20:12,14` as (20, 12), (20, 14). Raises InvalidRequest where the text has another form."""
    from stitch.errors import InvalidRequest
    from stitch_training.least_squares import CutPoint

    bottom, colon, tops = text.partition(":")
    if not colon or not all(part.isdecimal() for part in (bottom, *tops.split(","))):
        raise InvalidRequest("cuts", text, "a cut is written K:J or K:J,J, with layer numbers")
    return [CutPoint(int(bottom), int(top)) for top in tops.split(",")]


def parse_control(text: str) -> Control:
    """Parses `top` or `bottom:20`. Raises InvalidRequest where the text has another form."""
    from stitch.cluster import ROLES
    from stitch.errors import InvalidRequest
    from stitch_training.fit import Control

    model, colon, layers = text.partition(":")
    role = next((role for role in ROLES if role == model), None)
    if role is None or (colon and not layers.isdecimal()):
        raise InvalidRequest("control", text, "a control is written bottom, top, bottom:K or top:K")
    return Control(role, int(layers) if colon else None)


def parse_costs(pairs: Sequence[str]) -> dict[str, float] | None:
    """Parses `["a=1.5"]` as {"a": 1.5}, and no pairs as None. Raises InvalidRequest where a cost is not a number."""
    from stitch.cli.arguments import named
    from stitch.errors import InvalidRequest

    try:
        return {name: float(value) for name, value in named(pairs, "costs").items()} or None
    except ValueError as error:
        raise InvalidRequest("costs", list(pairs), "each must be NAME=NUMBER") from error


def _data_settings(parsed: argparse.Namespace) -> DataSettings:
    """Raises InvalidRequest where a flag is out of its range."""
    from stitch.errors import InvalidRequest
    from stitch_training.data import DataSettings

    given = vars(parsed)
    for field, least, most in _RANGES:
        value = given.get(field, least)
        if value < least or (most is not None and value > most):
            limit = f"it must be at least {least}" if most is None else f"it must be {least} to {most}"
            raise InvalidRequest(field, value, limit)
    shares = tuple(given.get("shares", ()))
    if shares and (len(shares) != len(parsed.data) or min(shares) < 1):
        raise InvalidRequest("shares", shares, f"it must be one number over 0 for each of {len(parsed.data)} files")
    return DataSettings(
        files=tuple(parsed.data),
        tokens=given.get("tokens", 0),
        held_out_tokens=parsed.held_out_tokens,
        sequence_tokens=parsed.sequence_tokens,
        seed=given.get("seed", 0),
        shares=shares,
    )


def _training_settings(parsed: argparse.Namespace) -> TrainingSettings:
    """Raises InvalidRequest where a flag is out of its range."""
    from stitch.errors import InvalidRequest
    from stitch_training.distill import TrainingSettings

    checks: tuple[tuple[str, bool, str], ...] = (
        ("epochs", parsed.epochs >= 0, "it must be at least 0"),
        ("learning_rate", 0 < parsed.learning_rate <= 1, "it must be over 0 and at most 1"),
        ("teacher_share", 0 <= parsed.teacher_share <= 1, "it must be 0 to 1"),
        ("batch_sequences", parsed.batch_sequences >= 1, "it must be at least 1"),
        ("evaluations", parsed.evaluations >= 1, "it must be at least 1"),
        ("adapter_rank", parsed.adapter_rank >= 0, "it must be at least 0"),
    )
    for field, is_valid, limit in checks:
        if not is_valid:
            raise InvalidRequest(field, getattr(parsed, field), limit)
    return TrainingSettings(
        aim=parsed.aim,
        epochs=parsed.epochs,
        batch_sequences=parsed.batch_sequences,
        learning_rate=parsed.learning_rate,
        teacher_share=parsed.teacher_share,
        loss_on=parsed.loss_on,
        evaluations=parsed.evaluations,
        adapter_rank=parsed.adapter_rank,
        seed=parsed.seed,
    )


def _run_dir(parsed: argparse.Namespace) -> Path:
    path: Path = parsed.run_dir or parsed.out.with_name(parsed.out.name + ".run")
    return path


def _use_threads(parsed: argparse.Namespace) -> None:
    import torch

    if parsed.threads > 0:
        torch.set_num_threads(parsed.threads)


if __name__ == "__main__":
    sys.exit(main())
