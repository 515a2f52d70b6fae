"""The configuration of a model whose family has native layers, read from its config.json without `transformers`.

`LlamaConfig.read` takes the fields that native layers need, and returns None for a file with any other field or value:
`transformers` then reads the file, refuses it by field or fills in its family's defaults, and `LlamaConfig.of` takes
what native layers compute from the result. Both give the same configuration for the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from stitch.settings import Settings
from stitch_server.model.weights import EMBEDDING, HEAD

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
QWEN = ("qwen2", "qwen3")
# Scalings whose angles depend on the position alone, not on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SCALED_FROM_AN_ORIGINAL_LENGTH = ("llama3", "yarn")

Size = Annotated[int, Field(ge=1)]
LayerType = Literal["full_attention", "sliding_attention"]


class _Rope(Settings):
    """The fields of `rope_parameters`, or of `rope_scaling` in older files."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    # The older name of `rope_type`.
    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    rope_theta: float = Field(default=1.0, gt=0)
    factor: float = Field(default=1.0, ge=1)
    original_max_position_embeddings: Size = 1
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=1.0, gt=0)
    attention_factor: float = Field(default=1.0, gt=0)
    beta_fast: float = Field(default=1.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(default=1.0, gt=0)
    mscale_all_dim: float = Field(default=1.0, gt=0)
    truncate: bool = True


NEEDED_ROPE_FIELDS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"rope_theta", "factor"},
}
# What tools write into config.json about the file itself.
ANNOTATIONS = ("_name_or_path", "transformers.js_config")


class _Fields(Settings):
    """The fields of config.json that are read here; those from `architectures` on change nothing that is computed."""

    model_type: Literal["llama", "qwen2", "qwen3", "mistral"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Size
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[LayerType] | None = None
    pad_token_id: int | None = None

    architectures: list[str] | None = None
    attention_dropout: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    initializer_range: float = Field(default=0.02, ge=0, le=1)
    is_llama_config: bool = True
    pretraining_tp: int | None = None
    rope_interleaved: Literal[False] = False
    transformers_version: str | None = None
    use_cache: bool = True
    use_mrope: Literal[False] = False


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What native layers compute. Fields have the names that they have in config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    # `rope_type`, `rope_theta` and what the type needs.
    rope_parameters: Mapping[str, Any]
    # The tokens that a token attends to, itself included; None: all.
    sliding_window: int | None
    # The layers with the window are those of type `sliding_attention`; None: all are.
    layer_types: tuple[str, ...] | None
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> LlamaConfig | None:
        """Reads the fields of config.json; returns None for a file that is left to `transformers`."""
        fields = {name: value for name, value in fields.items() if name not in ANNOTATIONS}
        try:
            found = _Fields.model_validate(fields)
        except ValidationError:
            return None
        rope = _rope_parameters(fields)
        if rope is None or not _is_served(found) or (found.model_type == "mistral" and "sliding_window" not in fields):
            return None
        window = _window(found)
        return cls(
            **{name: getattr(found, name) for name in _COPIED},
            head_dim=found.head_dim or found.hidden_size // found.num_attention_heads,
            rope_parameters=rope,
            sliding_window=window,
            layer_types=None if window is None or found.model_type == "mistral" else _layer_types(found),
        )

    @classmethod
    def of(cls, config: PretrainedConfig) -> LlamaConfig:
        """Takes what native layers compute from the configuration of `transformers`, for a model that they support."""
        config.standardize_rope_params()
        window = None if config.model_type == "llama" else config.sliding_window
        # A family that has no biases has no field for them.
        copied: dict[str, Any] = {name: getattr(config, name, False) for name in _COPIED}
        return cls(
            **copied,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rope_parameters={name: value for name, value in config.rope_parameters.items() if name != "type"},
            sliding_window=window,
            layer_types=None if window is None or config.model_type == "mistral" else tuple(config.layer_types),
        )

    def window(self, layer: int) -> int | None:
        """Returns the tokens that a token attends to in a layer, itself included; None: all."""
        has_window = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if has_window else None

    def tensor_shapes(self) -> dict[str, list[int]]:
        """Returns the shape of every tensor of the model by name. Raises ValueError for sizes that no layer has."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; a rotation takes pairs of values")
        ends = {EMBEDDING: [self.vocab_size, self.hidden_size], HEAD: [self.vocab_size, self.hidden_size]}
        layer = self._layer_shapes()
        return {
            **ends,
            "model.norm.weight": [self.hidden_size],
            **{
                f"model.layers.{index}.{name}": shape
                for index in range(self.num_hidden_layers)
                for name, shape in layer.items()
            },
        }

    def _layer_shapes(self) -> dict[str, list[int]]:
        family, hidden, inner = self.model_type, self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        # Qwen2 has biases of queries, keys and values alone; Mistral has none.
        has_bias = self.attention_bias and family in ("llama", "qwen3")
        has_mlp_bias = self.mlp_bias and family == "llama"
        shapes = {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        if family == "qwen3":
            shapes |= {f"self_attn.{name}.weight": [self.head_dim] for name in ("q_norm", "k_norm")}
        for name, outputs, inputs, biased in (
            ("self_attn.q_proj", queries, hidden, has_bias or family == "qwen2"),
            ("self_attn.k_proj", keys, hidden, has_bias or family == "qwen2"),
            ("self_attn.v_proj", keys, hidden, has_bias or family == "qwen2"),
            ("self_attn.o_proj", hidden, queries, has_bias),
            ("mlp.gate_proj", inner, hidden, has_mlp_bias),
            ("mlp.up_proj", inner, hidden, has_mlp_bias),
            ("mlp.down_proj", hidden, inner, has_mlp_bias),
        ):
            shapes[f"{name}.weight"] = [outputs, inputs]
            if biased:
                shapes[f"{name}.bias"] = [outputs]
        return shapes


_COPIED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


def _is_served(found: _Fields) -> bool:
    """Whether the sizes fit each other, and no default of the family is needed."""
    heads, layers = found.num_attention_heads, found.num_hidden_layers
    # Those of Qwen3 have a size of their own.
    head_dim = found.head_dim or (0 if found.model_type == "qwen3" else found.hidden_size // heads)
    return (
        head_dim >= 2
        and head_dim % 2 == 0
        and heads % found.num_key_value_heads == 0
        and (found.model_type != "llama" or found.hidden_size % heads == 0)
        and (found.pad_token_id is None or 0 <= found.pad_token_id < found.vocab_size)
        and (found.layer_types is None or (found.model_type in QWEN and len(found.layer_types) == layers))
        and ("sliding_attention" not in (found.layer_types or ()) or _window(found) is not None)
    )


def _window(found: _Fields) -> int | None:
    """Returns none for Llama, Mistral's one for all layers, and that of Qwen where the file says that it is used."""
    is_used = found.model_type == "mistral" or (found.model_type in QWEN and found.use_sliding_window)
    return found.sliding_window if is_used else None


def _layer_types(found: _Fields) -> tuple[str, ...]:
    if found.layer_types is not None:
        return tuple(found.layer_types)
    full = min(found.max_window_layers, found.num_hidden_layers)
    return ("full_attention",) * full + ("sliding_attention",) * (found.num_hidden_layers - full)


def _rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns them under their names of today; None where one is missing, or where there are two of them."""
    given = [fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None]
    if len(given) > 1 or {} in given:
        return None
    rope = dict(*given)
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    if fields.get("rope_theta") is not None:
        rope.setdefault("rope_theta", fields["rope_theta"])
    if rope["rope_type"] in SCALED_FROM_AN_ORIGINAL_LENGTH:
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    return rope if NEEDED_ROPE_FIELDS[rope["rope_type"]] <= rope.keys() else None
