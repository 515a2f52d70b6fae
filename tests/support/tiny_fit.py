"""Tiny pairs and texts to fit stitches on. Knows no method of fitting."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from stitch_training.frozen_models import Pair
from stitch_training.packing import PackedSequence
from stitch_training.whole_model import WholeModel
from tests.support.tiny_model import TOKENS, write_tiny_model

SEQUENCE_TOKENS = 16
BOTTOM_LAYERS, TOP_LAYERS = 3, 2
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "Paris", "sleeps", "rivers", "run")


def load_whole(folder: Path, layers: int) -> WholeModel:
    return WholeModel.load(folder, layers, torch.device("cpu"), torch.float32)


def tiny_pair(folder: Path) -> Pair:
    """A bottom of width 48 and a top of width 32, loaded; written where they are not there yet."""
    if not (folder / "bottom").exists():
        write_tiny_model(folder / "bottom", "qwen2", layers=BOTTOM_LAYERS, hidden_size=48, heads=6)
        write_tiny_model(folder / "top", "llama", layers=TOP_LAYERS, seed=1, padding_rows=8)
    bottom, top = load_whole(folder / "bottom", BOTTOM_LAYERS), load_whole(folder / "top", TOP_LAYERS)
    return Pair(bottom, top, TOKENS)


def drawn_sequences(count: int, seed: int = 0) -> list[PackedSequence]:
    """Random tokens of two files in turn."""
    draw = random.Random(seed)
    return [
        PackedSequence(tuple(draw.randrange(TOKENS) for _ in range(SEQUENCE_TOKENS)), number % 2)
        for number in range(count)
    ]


def write_texts(path: Path, count: int = 120, seed: int = 0) -> Path:
    """JSON Lines of random sentences."""
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(_WORDS, k=12))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_cluster(folder: Path) -> Path:
    """A cluster file over the folder's tiny pair with one stitched route, `weak`, and its texts."""
    tiny_pair(folder)
    models = "".join(f'[models.{part}]\nid = "tiny/{part}"\nsource = "{folder / part}"\n' for part in ("bottom", "top"))
    shards = "".join(
        f'[[shards]]\nname = "{role}-0"\nrole = "{role}"\nlayers = [0, {layers}]\naddress = "127.0.0.1:0"\n'
        for role, layers in (("bottom", BOTTOM_LAYERS), ("top", TOP_LAYERS))
    )
    route = '[[routes]]\nname = "weak"\nbottom_layers = 2\ntop_from = 1\nstitch = "weak.safetensors"\n'
    file = folder / "cluster.toml"
    file.write_text(f'name = "tiny"\n{models}{route}{shards}[gateway]\naddress = "127.0.0.1:0"\n')
    return file
