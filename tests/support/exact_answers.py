"""Whether an answer of a tiny cluster is the one that its models give, computed by `transformers` in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stitch.sampling import Sampling
from stitch_server.model.sampler import SampleRequest, sample
from tests.support.byte_tokenizer import tokens
from tests.support.stitched_reference import StitchedReference, WholeReference, reference
from tests.support.tiny_cluster import CUTS
from tests.support.tiny_model import TOKENS

# By how much a logit may differ between a chain and `transformers`: two tokens nearer to each other are equally good.
TOLERANCE = 1e-3
STITCHES = {"weak": "stitch.safetensors", "strong": "strong.safetensors"}


class ExactAnswers:
    """The models of the cluster that `write_tiny_cluster` wrote into a folder, without any shard or cache."""

    def __init__(self, folder: Path) -> None:
        self._references: dict[str, StitchedReference | WholeReference] = {
            route: reference(folder / "bottom", folder / "top", folder / STITCHES[route], *cut)
            for route, cut in CUTS.items()
        }
        self._references |= {"small": WholeReference(folder / "top"), "whole": WholeReference(folder / "bottom")}

    def continuation(
        self, route: str, prompt: str, token_ids: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """For each token of an answer, the one that the models and the sampler choose after the tokens before it.

        Equal to `token_ids` exactly where the models give that answer.
        """
        if not token_ids:
            return []
        prompt_ids = tokens(prompt)
        history = [*prompt_ids, *token_ids]
        # Shards exclude the rows that pad the top model's vocabulary.
        rows = self._references[route].logits(history)[len(prompt_ids) - 1 : -1, :TOKENS].clone()
        rows[range(len(token_ids)), list(token_ids)] += TOLERANCE
        sampling = Sampling(temperature=temperature, seed=seed)
        requests = [
            SampleRequest(sampling, position, history[:position], len(prompt_ids))
            for position in range(len(prompt_ids), len(history))
        ]
        return [token.id for token in sample(rows, requests)]
