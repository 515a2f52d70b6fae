"""The verb `stitch-server fit`: flags in, one stitch with its report and plot out. Knows no method."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stitch.errors import InvalidRequest
from stitch.progress import ProgressLine
from stitch_training.fit_arguments import add_cluster, add_data, add_work, data_settings, use_threads

if TYPE_CHECKING:
    from stitch_training.distill import Training
    from stitch_training.fit import Fit

PURPOSE = "make the stitch of a route: least squares, then distillation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_cluster(parser)
    add_data(parser, tokens=100_000)
    parser.add_argument("--route", metavar="R", required=True, help="the route whose stitch to make")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    add_work(parser)
    parser.add_argument(
        "--aim", choices=["states", "answers"], default="states",
        help="of least squares: the top's states, or the bottom's answers through the top's head; default: states",
    )  # fmt: skip
    parser.add_argument("--epochs", metavar="N", type=int, default=1, help="of distillation; 0: least squares alone")
    parser.add_argument("--learning-rate", metavar="X", type=float, default=1e-3, help="at the start; default: 0.001")
    parser.add_argument(
        "--teacher-share",
        metavar="X",
        type=float,
        default=0.5,
        help="weight of the bottom's distribution against the next token, 0 to 1; default: 0.5",
    )
    parser.add_argument("--batch-sequences", metavar="N", type=int, default=4, help="in one step; default: 4")
    parser.add_argument(
        "--start", metavar="STITCH", type=Path, help="go on from this stitch of the cut, in place of least squares"
    )
    parser.add_argument(
        "--adapter-rank", metavar="N", type=int, default=0,
        help="of adapters beside the top's layers, made with the stitch; default: 0, none",
    )  # fmt: skip
    parser.add_argument("--evaluations", metavar="N", type=int, default=10, help="of held-out loss; default: 10")
    parser.add_argument(
        "--store", choices=["float32", "bfloat16"], default="float32", help="how the file keeps it; default: float32"
    )


def run(parsed: argparse.Namespace) -> None:
    """Fits, and writes FILE, FILE's name with .json, and with .png. Raises whatever `fitting.fit` raises."""
    from stitch.cluster import load_cluster
    from stitch_training.fit import FitSettings, fit

    settings = FitSettings(
        cluster=load_cluster(parsed.cluster),
        route=parsed.route,
        data=data_settings(parsed),
        training=training_settings(parsed),
        dtype=parsed.dtype,
        work=parsed.work or parsed.out.with_name(parsed.out.name + ".work"),
        reuse=tuple(parsed.reuse),
        start=parsed.start,
    )
    use_threads(parsed)
    with ProgressLine() as progress:
        write(fit(settings, progress), parsed.out, parsed.store)


def training_settings(parsed: argparse.Namespace) -> Training:
    """The flags of distillation. Raises InvalidRequest where one is out of its range."""
    from stitch_training.distill import Training

    checks: tuple[tuple[str, bool, str], ...] = (
        ("epochs", parsed.epochs >= 0, "it must be at least 0"),
        ("learning_rate", 0 < parsed.learning_rate <= 1, "it must be over 0 and at most 1"),
        ("teacher_share", 0 <= parsed.teacher_share <= 1, "it must be 0 to 1"),
        ("batch_sequences", parsed.batch_sequences >= 1, "it must be at least 1"),
        ("evaluations", parsed.evaluations >= 1, "it must be at least 1"),
        ("adapter_rank", parsed.adapter_rank >= 0, "it must be at least 0"),
    )
    for field, fits, limit in checks:
        if not fits:
            raise InvalidRequest(field, getattr(parsed, field), limit)
    return Training(
        aim=parsed.aim,
        epochs=parsed.epochs,
        batch_sequences=parsed.batch_sequences,
        learning_rate=parsed.learning_rate,
        teacher_share=parsed.teacher_share,
        evaluations=parsed.evaluations,
        adapter_rank=parsed.adapter_rank,
        seed=parsed.seed,
    )


def write(fitted: Fit, out: Path, store: str) -> None:
    """The artefact, its report and its plot; prints the table of losses."""
    import torch

    from stitch_server.model.stitch import Stitch, StitchBinding
    from stitch_training.fit_report import loss_lines, plot_losses, write_json

    loaded, dtype = fitted.loaded, getattr(torch, store)
    binding = StitchBinding.of(loaded.bottom, loaded.top, *fitted.cut, loaded.tokenizer)
    weight, bias = fitted.map.weight.to(dtype), fitted.map.bias.to(dtype)
    first = None if fitted.map.first is None else fitted.map.first.to(dtype)
    adapters = None if fitted.adapters is None else fitted.adapters.to(torch.device("cpu"), dtype)
    Stitch(weight, bias, binding, making(fitted.report), adapters=adapters, first=first).save(out)
    write_json(out.with_suffix(".json"), fitted.report)
    plot_losses(fitted.report, out.with_suffix(".png"))
    print("\n".join(loss_lines(fitted.report)))
    print(f"written: {out}, with its report (.json) and its losses (.png)")


def making(report: dict[str, Any]) -> dict[str, Any]:
    """What the artefact says of its making; the same for the same fit, so without durations."""
    kept = ("data", "files", "tokens", "seed", "dtype")
    losses = {name: round(levels["all"]["mean"], 4) for name, levels in report["losses"].items()}
    method = "least squares, then distillation" if report["history"] else "least squares"
    training = report["training"] if report["history"] else {}
    return {"method": method, "training": training, "losses": losses} | {name: report[name] for name in kept}
