"""What transformers' Qwen3ForCausalLM and our checkpoints call the same tensors and sizes, both ways."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Model
from ..errors import SodaError
from ..files import read_json, reading
from ..vocab import TokenSpace

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # megatron-core's

# A layer: our tensor, and those of Qwen3 that it holds.
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm",),
    "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2.weight": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Part:
    """One tensor of ours, of a layer or of the whole model, and the tensors of Qwen3 that it holds."""

    name: str  # in a checkpoint
    layer: int | None
    theirs: tuple[str, ...]
    kind: Literal["plain", "vocabulary", "qkv", "gate_up"] = "plain"

    def split(self, tensor: Tensor, m: Model, rows: int) -> list[Tensor]:
        """Ours -> `theirs`. A table is cut to the first `rows`: the rest is padding."""
        if self.kind == "vocabulary":
            return [tensor[:rows]]
        if self.kind == "gate_up":
            return list(tensor.chunk(2))
        if self.kind == "qkv":
            heads = m.num_attention_heads // m.num_query_groups
            qkv = tensor.view(m.num_query_groups, heads + 2, m.head_dim, m.hidden_size)
            parts = qkv[:, :heads], qkv[:, heads], qkv[:, heads + 1]
            return [part.reshape(-1, m.hidden_size) for part in parts]
        return [tensor]

    def join(self, theirs: list[Tensor], m: Model, rows: int) -> Tensor:
        """`theirs` -> ours. A table gets zeros up to `rows`."""
        if self.kind == "vocabulary":
            (table,) = theirs
            return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])
        if self.kind == "gate_up":
            return torch.cat(theirs)
        if self.kind == "qkv":
            grouped = [part.view(m.num_query_groups, -1, m.head_dim, m.hidden_size) for part in theirs]
            return torch.cat(grouped, 1).reshape(-1, m.hidden_size)
        return theirs[0]


def parts(m: Model) -> Iterator[Part]:
    """All tensors of a model, in the order in which they are written."""
    yield Part("embedding.word_embeddings.weight", None, (EMBEDDING,), "vocabulary")
    kinds: dict[int, Literal["plain", "gate_up", "qkv"]] = {1: "plain", 2: "gate_up", 3: "qkv"}
    for layer in range(m.num_layers):
        for name, theirs in _LAYER.items():
            names = tuple(f"model.layers.{layer}.{one}.weight" for one in theirs)
            yield Part(f"decoder.layers.{name}", layer, names, kinds[len(theirs)])
    yield Part("decoder.final_layernorm.weight", None, ("model.norm.weight",))
    if not m.tie_embeddings:
        yield Part("output_layer.weight", None, (HEAD,), "vocabulary")


def shapes(m: Model, rows: int) -> dict[str, tuple[int, ...]]:
    """Qwen3's tensors by name, in the order of `parts`; both tables with so many rows."""
    hidden, queries, keys = m.hidden_size, m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    by_name: dict[str, tuple[int, ...]] = {
        "embed_tokens": (rows, hidden),
        "lm_head": (rows, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "q_norm": (m.head_dim,),
        "k_norm": (m.head_dim,),
        "o_proj": (hidden, queries),
        "gate_proj": (m.ffn_hidden_size, hidden),
        "up_proj": (m.ffn_hidden_size, hidden),
        "down_proj": (hidden, m.ffn_hidden_size),
    }
    names = (name for part in parts(m) for name in part.theirs)
    return {name: by_name.get(name.split(".")[-2], (hidden,)) for name in names}


def our_shape(part: Part, theirs: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor of ours without padding. `theirs`: of `shapes`."""
    first = theirs[part.theirs[0]]
    return first if len(part.theirs) == 1 else (sum(theirs[name][0] for name in part.theirs), first[1])


# ---- config.json


def hf_config(m: Model, space: TokenSpace, max_length: int, dtype: torch.dtype = torch.float32) -> Any:
    """The Qwen3Config of a model."""
    from transformers import Qwen3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(m.rope_theta)}
    if m.rope_scaling_factor != 1.0:
        rope |= {"rope_type": "llama3", "factor": m.rope_scaling_factor, **LLAMA3}
    config = Qwen3Config(
        vocab_size=space.size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_query_groups,
        head_dim=m.head_dim,
        max_position_embeddings=max_length,
        rms_norm_eps=m.norm_epsilon,
        initializer_range=m.init_std,
        tie_word_embeddings=bool(m.tie_embeddings),
        rope_parameters=rope,
        bos_token_id=space.bos,
        eos_token_id=space.eos,
        attention_bias=False,
        use_sliding_window=False,
    )
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], dtype
    return config


_LARGEST = {  # what a config may ask for: transformers makes lists of some of it
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 32,
}
_ONLY = {  # what megatron-core's layers here cannot be otherwise
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}


def from_config(path: Path) -> tuple[list[str], Any]:
    """The `model.` settings of a recipe for a config.json, as key=value, and its Qwen3Config.

    Raises SodaError for another architecture, and for what our model cannot be: it names the value.
    """
    from transformers import Qwen3Config

    values = read_json(path, dict)
    kind, classes = values.get("model_type"), values.get("architectures") or ["Qwen3ForCausalLM"]
    if kind != "qwen3" or classes != ["Qwen3ForCausalLM"]:
        raise SodaError(f"{path}: a model of type {kind!r} ({classes}); only Qwen3ForCausalLM can be imported")
    for name in ("auto_map", "quantization_config"):
        if values.get(name):
            raise SodaError(f"{path}: has {name}; only a plain Qwen3ForCausalLM can be imported")
    for name, largest in _LARGEST.items():
        value = values.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise SodaError(f"{path}: {name} is {value!r}, not a whole number from 1 to {largest:,}")
    with reading(path, "not the configuration of a Qwen3"):
        config: Any = Qwen3Config.from_dict(values)
        rope = dict(config.rope_parameters)
        for name, wanted in _ONLY.items():
            if getattr(config, name) != wanted:
                raise SodaError(f"{path}: {name} is {getattr(config, name)!r}; only {wanted!r} can be imported")
        if set(config.layer_types) != {"full_attention"}:
            raise SodaError(f"{path}: layer_types are {sorted(set(config.layer_types))}; only full_attention is known")
        settings = {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "tie_embeddings": str(bool(config.tie_word_embeddings)).lower(),
            "norm_epsilon": float(config.rms_norm_eps),
            "rope_theta": _theta(rope, path),
            "rope_scaling_factor": _scaling(rope, path),
        }
    return [f"model.{name}={value}" for name, value in settings.items()], config


def _theta(rope: dict[str, Any], path: Path) -> int:
    theta = float(rope["rope_theta"])
    if theta != int(theta) or theta < 1:
        raise SodaError(f"{path}: rope_theta is {theta!r}; only whole numbers can be imported")
    return int(theta)


def _scaling(rope: dict[str, Any], path: Path) -> float:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return 1.0
    if kind != "llama3" or any(rope.get(name) != value for name, value in LLAMA3.items()):
        told = {name: value for name, value in rope.items() if name != "rope_theta"}
        raise SodaError(
            f"{path}: rotary positions are scaled by {told}; only Llama-3's scaling with {LLAMA3}, or none, is known"
        )
    return float(rope["factor"])
