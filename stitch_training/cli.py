"""The command `stitch-train`: makes stitches, probes and routers, offline. Parses, then calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stitch.environment import prepare_program
from stitch_training import arguments

if TYPE_CHECKING:
    from stitch_training.data import DataSettings
    from stitch_training.distill import TrainingSettings
    from stitch_training.fit import Control
    from stitch_training.least_squares import CutPoint
    from stitch_training.prompt_runs import GatewayConnection

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
    ("rank", 1, None),
    ("batch_sequences", 1, None),
    ("epochs", 0, None),
    ("held_out_tokens", 1, None),
    ("sequence_tokens", 16, None),
)


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 where the input is invalid, 1 where the cluster, a file or a prompt fails."""
    prepare_program()
    parsed = build_parser().parse_args(given)
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
    arguments.add_fit(verbs).set_defaults(call=_fit)
    arguments.add_fit_within(verbs).set_defaults(call=_fit_within)
    arguments.add_gates(verbs).set_defaults(call=_gates)
    arguments.add_sweep(verbs).set_defaults(call=_sweep)
    arguments.add_evaluate(verbs).set_defaults(call=_evaluate)
    arguments.add_probe(verbs).set_defaults(call=_probe)
    arguments.add_answers(verbs).set_defaults(call=_answers)
    arguments.add_label(verbs).set_defaults(call=_label)
    router = arguments.add_router(verbs)
    arguments.add_train_router(router).set_defaults(call=_train_router)
    arguments.add_evaluate_router(router).set_defaults(call=_evaluate_router)
    arguments.add_calibrate(verbs).set_defaults(call=_calibrate)
    return parser


def _fit(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.device import training_device
    from stitch_training.fit import FitSettings, fit, write_fit

    settings = FitSettings(
        cluster=load_cluster(parsed.cluster),
        subject=parse_control(parsed.control) if parsed.control else parsed.route,
        data=_data_settings(parsed),
        training=_training_settings(parsed),
        dtype=parsed.dtype,
        device=training_device(parsed.device),
        run_dir=_run_dir(parsed),
        reuse=tuple(parsed.reuse),
        start=parsed.start,
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        write_fit(fit(settings, progress), parsed.out, parsed.store)


def _fit_within(parsed: argparse.Namespace) -> None:
    import time

    began = time.monotonic()
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.device import training_device
    from stitch_training.fit_within import FitWithinSettings, TimeLimit, fit_within

    data = _data_settings(parsed)
    settings = FitWithinSettings(
        cluster=load_cluster(parsed.cluster),
        route=parsed.route,
        prompts=data.files,
        run_dir=parsed.run_dir,
        out=parsed.out,
        seconds=parsed.seconds,
        device=training_device(parsed.device),
        dtype=parsed.dtype,
        tokens=data.tokens,
        held_out_tokens=data.held_out_tokens,
        sequence_tokens=data.sequence_tokens,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        training=_training_settings(parsed),
        pack_mebibytes=parsed.pack_mebibytes,
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        packed = fit_within(settings, TimeLimit(parsed.seconds, began), progress)
    left_out = f", without {', '.join(packed.left_out)}" if packed.left_out else ""
    print(f"packed: {parsed.out}, with {', '.join(packed.names)}{left_out}")


def _gates(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.device import training_device
    from stitch_training.ffn_skip import SkipSettings, fit_gates
    from stitch_training.report import write_json

    settings = SkipSettings(
        cluster=load_cluster(parsed.cluster),
        role=parsed.model,
        data=_data_settings(parsed),
        dtype=parsed.dtype,
        device=training_device(parsed.device),
        run_dir=_run_dir(parsed),
        shares=tuple(parsed.skip_shares),
        rank=parsed.rank,
        epochs=parsed.epochs,
        batch_sequences=parsed.batch_sequences,
        learning_rate=parsed.learning_rate,
        reuse=tuple(parsed.reuse),
    )
    _use_threads(parsed)
    with ProgressLine() as progress:
        fitted = fit_gates(settings, progress)
    fitted.gates.save(parsed.out)
    write_json(parsed.out.with_suffix(".json"), fitted.report)
    for share, one in fitted.gates.calibrations.items():
        print(f"{share:g}: {' '.join(f'{rate:.2f}' for rate in one.rates)}")


def _sweep(parsed: argparse.Namespace) -> None:
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.device import training_device
    from stitch_training.report import write_json
    from stitch_training.sweep import SweepSettings, sweep

    settings = SweepSettings(
        cluster=load_cluster(parsed.cluster),
        cuts=tuple(cut for text in parsed.cuts for cut in parse_cuts(text)),
        data=_data_settings(parsed),
        dtype=parsed.dtype,
        device=training_device(parsed.device),
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
    from stitch_training.device import training_device
    from stitch_training.evaluate import EvaluationSettings, evaluate, write_evaluation

    settings = EvaluationSettings(
        cluster=load_cluster(parsed.cluster),
        data=_data_settings(parsed),
        dtype=parsed.dtype,
        device=training_device(parsed.device),
        held_out_percent=parsed.held_out_percent,
        controls=tuple(parsed.controls),
        quantizations=tuple(parsed.quantizations),
        timings=parsed.timings,
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
    from stitch_training.device import training_device
    from stitch_training.labels import read_labels
    from stitch_training.probe import ProbeSettings, routes_by_cost, train_probe, write_probe

    cluster, dtype, device = load_cluster(parsed.cluster), getattr(torch, parsed.dtype), training_device(parsed.device)
    settings = ProbeSettings(cluster, parsed.tokens, parsed.budget, parsed.folds, dtype, parsed.chat, device)
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
        data=tuple(parsed.data),
        out=parsed.out,
        route=parsed.route,
        prompts=parsed.prompts,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        seed=parsed.seed,
        concurrency=parsed.concurrency,
    )
    return int(asyncio.run(make_answers(settings, _connection(parsed))).failed > 0)


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
        cross_validate(parsed.data, routes, renamed, parsed.folds, parsed.seed, parsed.draws, parsed.plot, parsed.json)


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
        from stitch_training.device import training_device
        from stitch_training.probe import calibrate_probe

        if parsed.cluster is None:
            raise InvalidRequest("cluster", None, "--probe needs the cluster that it is for")
        _use_threads(parsed)
        cluster, dtype = load_cluster(parsed.cluster), getattr(torch, parsed.dtype)
        device = training_device(parsed.device)
        with ProgressLine() as progress:
            thresholds, summary = calibrate_probe(
                cluster, parsed.probe, parsed.data, parsed.budget, parsed.cost, costs, dtype, progress, device
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
        aim=getattr(parsed, "aim", "states"),
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
