"""Loads both models of a cluster for fitting. Knows no route and no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stitch.cluster import ROLES, ClusterConfig
from stitch.environment import cache_folder
from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.stitch import Stitch
from stitch_server.model.tokenizer_hash import tokenizer_hash
from stitch_server.sources.resolve import resolve
from stitch_training.encoding import FolderEncoder
from stitch_training.frozen_models import Pair
from stitch_training.whole_model import WholeModel


@dataclass(frozen=True)
class LoadedPair:
    """Two models in memory, and what identifies them."""

    pair: Pair
    bottom: ModelDescription
    top: ModelDescription
    bottom_count: ParameterCount
    top_count: ParameterCount
    encoder: FolderEncoder
    tokenizer: str

    @property
    def is_one_model(self) -> bool:
        """Whether a model is cut against itself."""
        return self.pair.bottom is self.pair.top

    def stitch(self, path: Path, cut: tuple[int, int]) -> Stitch:
        """The stitch of a file in float32. Raises Incompatible where it was made for another pair or cut."""
        stitch = Stitch.load(path, torch.device("cpu"), torch.float32)
        stitch.check_models(self.bottom.to_proto(), self.top.to_proto())
        stitch.check_cut(*cut)
        stitch.check_tokenizer(self.tokenizer)
        stitch.check_depth(self.top.layers)
        return stitch


def load_pair(cluster: ClusterConfig, dtype: torch.dtype) -> LoadedPair:
    """Both models whole, on the processor, in `dtype`; once where they are one.

    Raises Incompatible where their tokenizers differ.
    """
    sources = cluster.models.bottom, cluster.models.top
    folders = [resolve(cluster.model_source(role), cache_folder()) for role in ROLES]
    hashes = [tokenizer_hash(folder) for folder in folders]
    if hashes[0] != hashes[1]:
        raise Incompatible(f"the tokenizers of {sources[0].id} and {sources[1].id} differ")
    descriptions = [ModelDescription.read(folder, source.id) for folder, source in zip(folders, sources, strict=True)]
    bottom = _load(folders[0], descriptions[0], dtype)
    top = bottom if folders[0] == folders[1] else _load(folders[1], descriptions[1], dtype)
    return LoadedPair(
        pair=Pair(bottom, top, min(model.vocabulary_size for model in descriptions)),
        bottom=descriptions[0],
        top=descriptions[1],
        bottom_count=ParameterCount.read(folders[0]),
        top_count=ParameterCount.read(folders[1]),
        encoder=FolderEncoder(folders[0]),
        tokenizer=hashes[0],
    )


def _load(folder: Path, description: ModelDescription, dtype: torch.dtype) -> WholeModel:
    return WholeModel.load(folder, description.layers, torch.device("cpu"), dtype)
