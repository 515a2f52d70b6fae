"""Hashes a tokenizer, which the two models of a pair must share. Imports neither torch nor `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stitch.errors import Incompatible


def tokenizer_hash(folder: Path) -> str:
    """Returns SHA-256 in hex over tokenizer.json's tokens with their ids, and its merges.

    The same tokenizer written by different programs has the same hash: merges are pairs or strings, and added
    tokens may or may not be part of the vocabulary. Raises Incompatible if the file is missing.
    """
    fields = _read(folder)
    canonical = json.dumps([_ids(fields), _merges(fields["model"])], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_count(folder: Path) -> int:
    """Returns the end of the tokens' ids; a model's vocabulary may be padded beyond it."""
    return max(_ids(_read(folder)).values()) + 1


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Incompatible(f"{folder} has no tokenizer.json")
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields


def _ids(fields: dict[str, Any]) -> dict[str, int]:
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, list):
        # Unigram: token and score, in the order of their ids.
        vocabulary = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{added["content"]: added["id"] for added in fields.get("added_tokens", [])}}


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
