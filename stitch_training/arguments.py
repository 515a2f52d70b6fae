"""The flags of `stitch-train`, one function a verb; imports the standard library alone, so that --help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_verb(verbs: Verbs, name: str, purpose: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=purpose, description=purpose)


def add_fit(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `fit` with its flags, and returns its parser."""
    verb = _add_verb(verbs, "fit", "make the stitch of a route: least squares, then distillation")
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
    _add_training(verb, adapter_rank=0, teacher_share=0.5, loss_on="content")
    verb.add_argument(
        "--start", metavar="STITCH", type=Path, help="start from this stitch of the cut, instead of least squares"
    )
    verb.add_argument(
        "--store", choices=["float32", "bfloat16"], default="float32", help="dtype of the file; default: float32"
    )
    return verb


def add_gates(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `gates` with its flags, and returns its parser."""
    verb = _add_verb(verbs, "gates", "make gates by which a model's generated tokens leave out FFNs")
    _add_cluster(verb)
    _add_text(verb, tokens=50_000)
    verb.add_argument("--model", choices=["bottom", "top"], default="bottom", help="whose layers; default: bottom")
    verb.add_argument(
        "--skip-shares", metavar="X", nargs="+", type=float, default=[0.1, 0.2, 0.3],
        help="of all FFNs, to calibrate to; default: 0.1 0.2 0.3",
    )  # fmt: skip
    verb.add_argument("--rank", metavar="N", type=int, default=16, help="of what heals a skipped FFN; default: 16")
    verb.add_argument("--epochs", metavar="N", type=int, default=1, help="over the data; default: 1")
    verb.add_argument("--batch-sequences", metavar="N", type=int, default=2, help="in one step; default: 2")
    verb.add_argument("--learning-rate", metavar="X", type=float, default=1e-3, help="at the start; default: 0.001")
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    _add_run_dir(verb)
    return verb


def add_sweep(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `sweep` with its flags, and returns its parser."""
    verb = _add_verb(verbs, "sweep", "compare many cut points by least squares from one pass over the data")
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
    return verb


def add_evaluate(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `evaluate` with its flags, and returns its parser."""
    verb = _add_verb(verbs, "evaluate", "measure both models and every route on held-out text")
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
    verb.add_argument(
        "--quantizations", metavar="KIND", nargs="+", choices=["int8", "int4"], default=[],
        help="measure every system once more with weights of these kinds: int8, int4",
    )  # fmt: skip
    verb.add_argument(
        "--timings", metavar="FILE", type=Path,
        help="a report of `benchmarks.bench_routes` on this cluster, whose times come into the table",
    )  # fmt: skip
    verb.add_argument("--out", metavar="FILE", type=Path, help="a .json file; tables (.md) and plot (.png) are beside")
    return verb


def add_probe(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `probe` with its flags, and returns its parser."""
    verb = _add_verb(verbs, "probe", "train the probe that decides routes within the first shard")
    _add_cluster(verb)
    _add_labels(verb, "labelled prompts: JSON lines, plain or gzip")
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    verb.add_argument("--tokens", metavar="N", type=int, default=128, help="of a prompt that it reads; default: 128")
    verb.add_argument("--chat", action="store_true", help="prompts are conversations of one turn, not plain text")
    verb.add_argument(
        "--budget", metavar="B", type=float, default=0.5, help="mean cost, 0 (all cheapest) to 1; default: 0.5"
    )
    verb.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")
    return verb


def add_fit_within(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `fit-within` with its flags, and returns its parser."""
    purpose = "make a route's stitch of the bottom's own answers within a time limit, and pack it; resumable"
    verb = _add_verb(verbs, "fit-within", purpose)
    _add_cluster(verb)
    verb.add_argument("--route", metavar="R", required=True, help="the route whose stitch to make")
    verb.add_argument("--seconds", metavar="N", type=float, required=True, help="until the program ends")
    verb.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True, help="conversations, questions or prompts"
    )
    verb.add_argument(
        "--run-dir", metavar="DIR", type=Path, required=True, help="resumed where it, or an unpacked archive, has some"
    )
    verb.add_argument("--out", metavar="FILE", type=Path, required=True, help="the archive, a .tar file")
    verb.add_argument(
        "--pack-mebibytes", metavar="N", type=int, default=64, help="the most that the archive has; default: 64"
    )
    verb.add_argument("--tokens", metavar="N", type=int, default=1_000_000, help="at most; default: 1,000,000")
    _add_sequences(verb)
    verb.add_argument("--max-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    verb.add_argument("--temperature", metavar="T", type=float, default=0.7, help="of answers; default: 0.7")
    _add_training(verb, adapter_rank=32, teacher_share=1.0, loss_on="assistant")
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="of answers and training; default: 0")
    return verb


def add_label(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `label` with its flags, and returns its parser."""
    from stitch.cli.arguments import add_connection

    purpose = "run prompts through the routes of a running cluster and record how good each answer is"
    verb = _add_verb(verbs, "label", purpose)
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
    return verb


def add_answers(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `answers` with its flags, and returns its parser."""
    from stitch.cli.arguments import add_connection

    purpose = "make training text of the answers that a route of a running cluster gives to prompts"
    verb = _add_verb(verbs, "answers", purpose)
    verb.add_argument("--gateway", metavar="HOST:PORT", required=True, help="of a running cluster")
    add_connection(verb)
    verb.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True,
        help="conversations, questions or prompts",
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
    return verb


def add_router(verbs: Verbs) -> Verbs:
    """Adds the verb `router`, and returns what its actions are added to."""
    router = _add_verb(verbs, "router", "train or evaluate the learned router of a gateway")
    return router.add_subparsers(required=True, metavar="ACTION")


def add_train_router(actions: Verbs) -> argparse.ArgumentParser:
    """Adds `router train` with its flags, and returns its parser."""
    train = _add_verb(actions, "train", "make a router from labelled prompts")
    _add_labels(train, "labelled prompts: JSON lines, plain or gzip; every file is a source with its own expert")
    train.add_argument("--out", metavar="FILE", type=Path, required=True, help="the artifact, a safetensors file")
    train.add_argument("--routes", metavar="NAME,…", default="weak,strong", help="cheapest first; default: %(default)s")
    train.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")
    return train


def add_evaluate_router(actions: Verbs) -> argparse.ArgumentParser:
    """Adds `router evaluate` with its flags, and returns its parser."""
    purpose = "compare a router with chance, prompt length and the best possible"
    evaluate = _add_verb(actions, "evaluate", purpose)
    subject = evaluate.add_mutually_exclusive_group(required=True)
    subject.add_argument("--router", metavar="FILE", type=Path, help="the artifact")
    subject.add_argument("--folds", metavar="N", type=int, help="no artifact: a router for each of N folds of the data")
    _add_labels(evaluate, "labelled prompts that the router was not trained on")
    evaluate.add_argument("--routes", metavar="NAME,…", default="weak,strong", help="of --folds; default: %(default)s")
    evaluate.add_argument("--seed", metavar="N", type=int, default=0, help="draws the folds; default: 0")
    evaluate.add_argument("--draws", metavar="N", type=int, default=1, help="of the folds, for means; default: 1")
    evaluate.add_argument("--plot", metavar="FILE", type=Path, help="draw the curves; one file per data file")
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return evaluate


def add_calibrate(verbs: Verbs) -> argparse.ArgumentParser:
    """Adds `calibrate` with its flags, and returns its parser."""
    purpose = "find the thresholds that keep a router or a probe within a budget"
    verb = _add_verb(verbs, "calibrate", purpose)
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
    return verb


def _add_cluster(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    _add_compute(verb)


def _add_compute(verb: argparse.ArgumentParser) -> None:
    kinds = ["float32", "bfloat16"]
    verb.add_argument("--dtype", choices=kinds, default="float32", help="how the models compute; default: float32")
    verb.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu, cuda or cuda:N; default: cpu")
    verb.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads; default: all cores")


def _add_text(verb: argparse.ArgumentParser, tokens: int | None = None) -> None:
    """Adds the flags of text to read; `tokens` is the default number of tokens to fit on, None: nothing is fitted."""
    verb.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True, help="text, JSONL, chat JSONL; .gz too"
    )
    _add_sequences(verb)
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


def _add_sequences(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--held-out-tokens", metavar="N", type=int, default=8192, help="to measure on; default: 8192")
    verb.add_argument("--sequence-tokens", metavar="N", type=int, default=512, help="in one sequence; default: 512")


def _add_training(verb: argparse.ArgumentParser, adapter_rank: int, teacher_share: float, loss_on: str) -> None:
    """Adds the flags of distillation, with these defaults."""
    verb.add_argument("--epochs", metavar="N", type=int, default=1, help="of distillation; 0: least squares alone")
    verb.add_argument("--learning-rate", metavar="X", type=float, default=1e-3, help="at the start; default: 0.001")
    verb.add_argument(
        "--teacher-share", metavar="X", type=float, default=teacher_share,
        help="weight of the bottom's distribution against the next token, 0 to 1; default: %(default)s",
    )  # fmt: skip
    _add_loss_on(verb, "the next tokens whose loss counts", loss_on)
    verb.add_argument("--batch-sequences", metavar="N", type=int, default=4, help="in one step; default: 4")
    verb.add_argument(
        "--adapter-rank", metavar="N", type=int, default=adapter_rank,
        help="of adapters beside the top's layers, trained with the stitch, 0: none; default: %(default)s",
    )  # fmt: skip
    verb.add_argument("--evaluations", metavar="N", type=int, default=10, help="of held-out loss; default: 10")


def _add_loss_on(verb: argparse.ArgumentParser, purpose: str, default: str = "content") -> None:
    verb.add_argument(
        "--loss-on", choices=["all", "content", "assistant"], default=default,
        help=f"{purpose}: all, those of texts and messages, or those of answers; default: %(default)s",
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
