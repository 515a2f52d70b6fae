"""Random probes for tiny clusters, which send about half of all random prompts to each route."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from stitch.cluster import load_cluster
from stitch.tokenizer_files import tokenizer_hash
from stitch_server.model.description import ModelDescription
from stitch_server.model.probe import Probe, ProbeBinding, feature_count
from stitch_training.probe import FeatureExtractor
from tests.support.tiny_model import TOKENS

# Number of a prompt's first tokens that the probe reads.
WINDOW = 12
PROMPTS = 60


def random_prompt(seed: int, tokens: int) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(TOKENS), k=tokens)


def with_tiny_probe(cluster_file: Path, tokens: int = WINDOW) -> Path:
    """Writes a probe beside a cluster file, and names it there; returns the cluster file."""
    save_tiny_probe(cluster_file, cluster_file.parent / "probe.safetensors", tokens)
    fields = json.loads(cluster_file.read_text())
    fields["gateway"]["probe"] = "probe.safetensors"
    cluster_file.write_text(json.dumps(fields))
    return cluster_file


def save_tiny_probe(cluster_file: Path, out: Path, tokens: int = WINDOW) -> Probe:
    """A probe whose threshold is the median gain of random prompts."""
    cluster = load_cluster(str(cluster_file))
    folder = Path(cluster.model_source("bottom"))
    extractor = FeatureExtractor.load(folder, cluster.earliest_cut, tokens, torch.float32, is_chat=False)
    rows = extractor.from_tokens(
        [random_prompt(seed, tokens + seed % 5) for seed in range(PROMPTS)], lambda done, total: None
    )
    bottom = ModelDescription.read(folder, cluster.models.bottom.id)
    weight = np.random.default_rng(1).standard_normal((1, feature_count(bottom.hidden_size)))
    gains = (rows @ weight.T)[:, 0]
    binding = ProbeBinding.of(bottom, cluster.earliest_cut, tokens, ("weak", "strong"), tokenizer_hash(folder))
    probe = Probe(
        weight=torch.from_numpy(weight.astype(np.float32)),
        bias=torch.zeros(1),
        binding=binding,
        thresholds=(float(np.median(gains)),),
        percentiles=tuple(np.quantile(gains, np.linspace(0, 1, 101)).tolist()),
    )
    probe.save(out)
    return probe
