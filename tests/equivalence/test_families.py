"""Every family of `transformers` computes what `transformers` computes, or is refused in one sentence.

The table of both is in docs/models.md: `python -m tests.equivalence.test_families` prints it.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stitch.errors import Incompatible
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import FAMILIES, ModelDescription
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.llama_config import FAMILIES as NATIVE
from tests.support.tiny_model import write_tiny_model
from tests.support.whole_model import CPU, our_logits, their_logits

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# Families without causal language models of their own: encoders and decoders, vision, speech.
OTHERS = ("t5", "llava", "mllama", "qwen2_vl", "qwen2_5_vl", "paligemma", "idefics3", "clip", "vit", "wav2vec2")
REFUSED = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OTHERS} - {*FAMILIES})
# Fields that some families have, and that others ignore.
FOREIGN_FIELDS: dict[str, Any] = {
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logit_scale": 0.5,
    "logits_scaling": 2.0,
    "final_logit_softcapping": 3.0,
    "partial_rotary_factor": 0.5,
    "clip_qkv": 0.1,
    "use_qk_norm": True,
    "original_max_position_embeddings": 7,
}
# A whole prompt of 24 tokens, some decode steps, and a chunk.
PASSES = (0, 24, 25, 26, 27, 40)


def write_family(folder: Path, family: str, **config: Any) -> Path:
    """Writes a tiny model, with a window shorter than the prompt where the family can have one."""
    window = {"sliding_window": 16} if hasattr(CONFIG_MAPPING[family], "sliding_window") else {}
    return write_tiny_model(folder, family, **window, **config)


@cache
def difference(family: str) -> float:
    """The largest difference of a logit from that of `transformers`."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_family(Path(folder), family)
        return float((our_logits(path, (0, 2, 4), PASSES) - their_logits(path)).abs().max())


@cache
def refusal(family: str) -> str:
    """What a folder of the family is refused with, without the folder's name; of its own defaults where it has some."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        try:
            CONFIG_MAPPING[family]().save_pretrained(path)
        except Exception:
            # Some need fields without defaults.
            (path / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(Incompatible) as refused:
            ModelDescription.read(path, family)
        return str(refused.value).removeprefix(f"{folder}/")


def table() -> str:
    """The table of docs/models.md."""
    served = {
        family: "equal to `transformers`" if difference(family) < 1e-4 else f"differs by {difference(family)}"
        for family in FAMILIES
    }
    refused = {family: f"refused: {refusal(family).partition(' is ')[0]}" for family in REFUSED}
    layers = {family: "native" if family in NATIVE else "of `transformers`" for family in FAMILIES}
    lines = [f"| {one} | {layers.get(one, 'none')} | {result} |" for one, result in (served | refused).items()]
    return "\n".join(["| family | layers | result |", "|---|---|---|", *lines])


def test_table_has_every_family_and_equals_the_document() -> None:
    assert len(FAMILIES) + len(REFUSED) > 40
    assert table() in DOCUMENT.read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_decode_steps_equal_transformers(family: str) -> None:
    assert difference(family) < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_refusal_is_one_sentence_that_names_the_field(family: str) -> None:
    # Some families are named after one whose models they load.
    assert re.fullmatch(r"config\.json: model_type is '[\w-]+', which is none of [^\n]*", refusal(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_other_families_change_nothing(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path, family)
    file, own = folder / "config.json", CONFIG_MAPPING[family]()
    foreign = {name: value for name, value in FOREIGN_FIELDS.items() if not hasattr(own, name)}
    assert foreign
    file.write_text(json.dumps(json.loads(file.read_text()) | foreign))
    torch.testing.assert_close(our_logits(folder, (0, 4), PASSES), their_logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_more_or_less_or_of_another_shape_is_refused_by_name(tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_family(tmp_path, family)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.self_attn.o_proj.weight"
    changes = {
        "scale": tensors | {f"{name}_scale": torch.ones(1)},
        "bias": tensors | {"model.layers.3.mlp.down_proj.new_bias": torch.ones(32)},
        "missing": {one: tensor for one, tensor in tensors.items() if one != name},
        "short": tensors | {name: tensors[name][:-1].contiguous()},
        "type": tensors | {name: tensors[name].to(torch.float8_e4m3fn)},
    }
    for kind, changed in changes.items():
        save_file(changed, file)
        with pytest.raises(Incompatible, match=r"model\.layers\.3\.(self_attn\.o_proj|mlp\.down_proj)") as refused:
            DecoderLayers.load(folder, 0, 1, CPU, torch.float32)
        assert "\n" not in str(refused.value), kind
    save_file(tensors, file)
    Embedding.load(folder, CPU, torch.float32)
    Head.load(folder, CPU, torch.float32)


if __name__ == "__main__":
    print(table())
