"""Tiny pairs and texts to fit stitches on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from stitch_training.data import PackedSequence, Role
from stitch_training.models import FrozenModel, Pair
from tests.support.tiny_model import TOKENS, write_tiny_model

SEQUENCE_TOKENS = 16
BOTTOM_LAYERS, TOP_LAYERS = 3, 2
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "Paris", "sleeps", "rivers", "run")


def load_frozen(folder: Path, layers: int) -> FrozenModel:
    return FrozenModel.load(folder, layers, torch.device("cpu"), torch.float32)


def write_pair(folder: Path) -> None:
    """Writes a bottom of width 48 and a top of width 32 where they are missing."""
    if not (folder / "bottom").exists():
        write_tiny_model(folder / "bottom", "qwen2", layers=BOTTOM_LAYERS, hidden_size=48, heads=6)
        write_tiny_model(folder / "top", "llama", layers=TOP_LAYERS, seed=1, padding_rows=8)


def tiny_pair(folder: Path) -> Pair:
    """Loads the folder's pair, and writes it first where it is missing."""
    write_pair(folder)
    bottom, top = load_frozen(folder / "bottom", BOTTOM_LAYERS), load_frozen(folder / "top", TOP_LAYERS)
    return Pair(bottom, top, TOKENS)


def drawn_sequences(count: int, seed: int = 0) -> list[PackedSequence]:
    """Returns sequences of random tokens, alternately of two files, of plain text and of answers to a template."""
    draw, half = random.Random(seed), SEQUENCE_TOKENS // 2
    roles = (Role.PLAIN,) * SEQUENCE_TOKENS, (Role.TEMPLATE,) * half + (Role.ASSISTANT,) * half
    return [
        PackedSequence(tuple(draw.randrange(TOKENS) for _ in range(SEQUENCE_TOKENS)), roles[number % 2], number % 2)
        for number in range(count)
    ]


def write_texts(path: Path, count: int = 120, seed: int = 0) -> Path:
    """Writes JSON Lines of random sentences."""
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(_WORDS, k=12))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, count: int = 120, seed: int = 0) -> Path:
    """Writes JSON Lines of questions with answers, both of random words."""
    draw = random.Random(seed)
    rows = [{"question": " ".join(draw.choices(_WORDS, k=6)), "answer": draw.choice(_WORDS)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_cluster(folder: Path) -> Path:
    """Writes a cluster file over the folder's tiny pair, with one stitched route, `weak`."""
    write_pair(folder)
    models = "".join(f'[models.{part}]\nid = "tiny/{part}"\nsource = "{folder / part}"\n' for part in ("bottom", "top"))
    shards = "".join(
        f'[[shards]]\nname = "{role}-0"\nrole = "{role}"\nlayers = [0, {layers}]\naddress = "127.0.0.1:0"\n'
        for role, layers in (("bottom", BOTTOM_LAYERS), ("top", TOP_LAYERS))
    )
    route = '[[routes]]\nname = "weak"\nbottom_layers = 2\ntop_from = 1\nstitch = "weak.safetensors"\n'
    file = folder / "cluster.toml"
    file.write_text(f'name = "tiny"\n{models}{route}{shards}[gateway]\naddress = "127.0.0.1:0"\n')
    return file
