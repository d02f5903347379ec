"""Qwen3s that transformers makes, and models of ours in Qwen3's names."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers
from torch import Tensor

from megatron_soda.config import Model, Recipe, load_recipe
from megatron_soda.hf.qwen3 import hf_config, parts, shapes
from megatron_soda.hf.tokenizer import save_tokenizer
from megatron_soda.hf.weights import ShardWriter
from megatron_soda.tokenizer import TextTokenizer
from megatron_soda.vocab import BOS, EOS, LLAMA3, TokenSpace

_TE = {  # Transformer Engine, and so every checkpoint, keeps a norm's weight in the linear layer behind it
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def as_qwen3(state: dict[str, Tensor], m: Model, space: TokenSpace) -> dict[str, Tensor]:
    """The state dict of a whole model, local or of Transformer Engine, in Qwen3's names."""
    named = {}
    for name, tensor in state.items():
        for local, te in _TE.items():
            name = name.replace(f".{local}", f".{te}")
        named[name] = tensor
    found = {}
    for part in parts(m):
        layer = f"decoder.layers.{part.layer}."
        ours = named[part.name if part.layer is None else part.name.replace("decoder.layers.", layer)]
        found |= dict(zip(part.theirs, part.split(ours, m, space.size), strict=True))
    return found


def save_qwen3(state: dict[str, Tensor], recipe: Recipe, space: TokenSpace, folder: Path) -> None:
    """Such a state dict as a folder that transformers loads, by transformers."""
    from transformers import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM(hf_config(recipe.model, space, recipe.data.sequence_length))
    missing, unknown = model.load_state_dict(as_qwen3(state, recipe.model, space), strict=False)
    assert not unknown
    assert set(missing) == ({"lm_head.weight"} if recipe.model.tie_embeddings else set())
    model.tie_weights()
    model.save_pretrained(folder)


def random_qwen3(
    folder: Path, *, rows: int, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> Any:
    """Writes a Qwen3 of random weights with transformers, in shards of that size. -> the model"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=rows, **{**sizes, **heads, **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # transformers starts them at one
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def write_llama3_tokenizer(path: Path) -> None:
    """A tokenizer.json with Llama-3's 128,256 ids: bytes, names that no text has, BOS and EOS where they belong."""
    tokenizer = json.loads(Engine(models.BPE({}, [])).to_str())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"word{i}" for i in range(len(letters), LLAMA3.bos))]
    tokenizer["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [BOS, EOS, *(f"<|reserved_{i}|>" for i in range(LLAMA3.eos + 1, LLAMA3.text_size))]
    tokenizer["added_tokens"] = [{"id": LLAMA3.bos + i, "content": name, **flags} for i, name in enumerate(added)]
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(tokenizer))


def write_soda(folder: Path, preset: str, dtype: torch.dtype, *overrides: str) -> None:
    """A folder as SODA's released ones: 144,644 ids, no text tokenizer. Random weights, a tensor at a time."""
    recipe = load_recipe(None, [f"model.preset={preset}", *overrides])
    folder.mkdir(parents=True)
    write_llama3_tokenizer(folder.parent / "llama3.json")
    save_tokenizer(TextTokenizer(folder.parent / "llama3.json"), LLAMA3, folder, 4096)
    writer = ShardWriter(folder, shapes(recipe.model, LLAMA3.size), dtype)
    draw = torch.Generator().manual_seed(0)
    for name, shape in writer.shapes.items():
        writer.write(name, torch.randn(shape, generator=draw).mul_(0.02).add_(0.0 if len(shape) == 2 else 1.0))
    writer.finish()
    hf_config(recipe.model, LLAMA3, 4096, dtype).save_pretrained(folder)
