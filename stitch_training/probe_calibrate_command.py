"""The verb `stitch-server calibrate`: a budget to the thresholds that keep a probe to it. Knows no quality."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stitch.errors import InvalidRequest
from stitch_training.fit_arguments import add_cluster, use_threads

PURPOSE = "find the thresholds that keep a probe within a budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_cluster(parser)
    parser.add_argument("--probe", metavar="FILE", type=Path, required=True, help="the artefact")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        type=Path,
        required=True,
        help="prompts like those to come, which the training has not seen; labels are not needed",
    )
    parser.add_argument("--budget", metavar="B", type=float, required=True, help="mean cost, 0 (all cheapest) to 1")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="what gateway.probe_thresholds names")


def run(parsed: argparse.Namespace) -> None:
    """Writes thresholds and says what they come to.

    Raises InvalidRequest or Incompatible where the budget, the data, the probe or the cluster is off.
    """
    import numpy as np
    import torch

    from stitch.cluster import load_cluster
    from stitch.environment import cache_folder
    from stitch.progress import ProgressLine
    from stitch_server.model.description import ModelDescription
    from stitch_server.model.probe import Probe
    from stitch_server.model.tokenizer_hash import tokenizer_hash
    from stitch_server.sources.resolve import resolve
    from stitch_training.calibration import calibrate, relative_costs
    from stitch_training.labels import read_prompts
    from stitch_training.probe_states import PromptReader

    if not 0 <= parsed.budget <= 1:
        raise InvalidRequest("budget", parsed.budget, "it must be 0 to 1")
    cluster, probe = load_cluster(parsed.cluster), Probe.load(parsed.probe, torch.device("cpu"))
    folder = resolve(cluster.model_source("bottom"), cache_folder())
    bottom = ModelDescription.read(folder, cluster.models.bottom.id)
    named = [route.name for route in cluster.routes]
    probe.check(bottom, cluster.earliest_cut, named, tokenizer_hash(folder))
    prompts = [prompt for path in parsed.data for prompt in read_prompts(path)]
    use_threads(parsed)
    dtype, chat = getattr(torch, parsed.dtype), bool(probe.training.get("chat"))
    reader = PromptReader.load(folder, probe.binding.layer, probe.binding.tokens, dtype, chat)
    with ProgressLine(sys.stderr) as progress:
        seen = reader.read(prompts, lambda done, of: progress("reading prompts", done, of))
    dearer = seen @ probe.weight.double().numpy().T + probe.bias.double().numpy()
    gains, routes = np.hstack([np.zeros((len(seen), 1)), dearer]), probe.binding.routes
    costs = relative_costs(routes, None)
    found = calibrate(gains, costs, parsed.budget)
    found.thresholds_file(routes, probe.fingerprint, gains, costs).write(parsed.out)
    print(found.said(routes, len(prompts)))
