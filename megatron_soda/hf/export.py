"""`soda export`: a checkpoint as a stock Qwen3ForCausalLM folder, compared with our model before it is done.

soda.json, beside the weights, says which checkpoint they are of and has the hash of every file (see load.py).
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from ..config import Model, Recipe, save_recipe
from ..console import console
from ..data.store import Store
from ..errors import SodaError
from ..files import read_json, read_sealed, reading, write_sealed
from ..parallel import ranks
from ..run_folder import record_timing
from ..tokenizer import NAMES, TextTokenizer, data_tokenizer, document_string
from ..vocab import TokenSpace
from .load import CONFIG, DESCRIPTION, file_hashes, quiet_transformers, read_export
from .tokenizer import save_tokenizer

TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}  # of a logit; the second is bfloat16's own grain
_CODEC = ("codec.json", "codec.safetensors")
_OF_THE_DATA = (*_CODEC, *NAMES)


def export(recipe: Recipe, folder: Path | None = None, to: Path | None = None) -> Path:
    """Writes the model `to` (RUN/hf) from the checkpoint `folder` (the newest) and returns it; skipped if it is there
    already, of the content of that checkpoint and whole. What is in `to` is replaced.

    Raises SodaError without a checkpoint, for one of another model, and if transformers' logits differ from ours.
    """
    from ..training import checkpoint

    began = time.monotonic()
    run = Path(recipe.run)
    if folder and (problems := checkpoint.damage(folder)):
        raise SodaError(f"{folder}: the checkpoint is damaged: {problems[0]}")
    newest = folder or checkpoint.newest_whole(run)
    if newest is None:
        raise SodaError(f"{run}: no checkpoint in it. Run `soda train` first.")
    final = to or run / "hf"
    with reading(newest / "checkpoint.json", "not the description of a checkpoint"):
        step = int(read_json(newest / "checkpoint.json")["step"])
    key = export_key(newest, recipe)
    if _is_done(final, key, recipe.data_folder):
        console.print(f"{final}: step {step} is exported already, nothing to do")
        return final
    from ..model.gpt import build_model

    quiet_transformers()
    recipe = recipe.on_one_rank()
    with console.status("exporting"):
        store = Store(recipe.data_folder / "test")
        saved = checkpoint.read_description(newest, recipe.model, store.space)
        made_by = saved.get("made_by") or store.made_by
        store.check_made_by(made_by, f"the model ({newest})", recipe.data.accept)
        device = ranks.init(recipe)
        ours = build_model(recipe, store.space, device)
        checkpoint.load(newest, [ours], None)
        temporary = final.parent / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        text = data_tokenizer(recipe.data_folder)
        write_model(ours.state_dict(), recipe, store.space, temporary)
        save_tokenizer(text, store.space, temporary, recipe.data.sequence_length)
        difference = compare_logits(ours, temporary, store, recipe)
        compare_tokenizer(temporary, store, text)
        _copy_codec(recipe.data_folder, temporary)
        shutil.copyfile(text.path, temporary / text.path.name)
        save_recipe(recipe, temporary / "recipe.yaml")
        config = read_json(temporary / "config.json")
        write_sealed(
            temporary / DESCRIPTION,
            {
                "name": recipe.name,
                "step": step,
                "key": key,
                "space": store.space.to_dict(),
                "made_by": made_by,
                "max_logit_difference": difference,
                "config": {name: config[name] for name in CONFIG},
                "files": file_hashes(temporary, [path.name for path in temporary.iterdir()]),
            },
        )
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    console.print(f"{final}: step {step}, largest logit difference to ours {difference:.1e}")
    record_timing(run, "export", {"seconds": time.monotonic() - began})
    return final


def export_key(folder: Path, recipe: Recipe) -> str:
    """Of the content of a checkpoint, not of its step, and of what the recipe says of the model."""
    from ..training import checkpoint

    parts = [recipe.name, asdict(recipe.model), recipe.data.sequence_length, recipe.precision.dtype]
    return hashlib.sha256(json.dumps([checkpoint.identity(folder), *parts]).encode()).hexdigest()[:16]


def _is_done(folder: Path, key: str, data: Path) -> bool:
    """Whether `folder` is an export of this key, whole, with the codec and the tokenizer of the data folder."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        if read_sealed(folder / DESCRIPTION).get("key") == key:
            files = read_export(folder)["files"]
            others = [n for n, entry in file_hashes(data, _OF_THE_DATA).items() if files.get(n) != entry]
            if not others:
                return True
            why = f"the data folder has another {others[0]}"
        else:
            why = "it is of another checkpoint or recipe"
    except SodaError as error:
        why = str(error)
    console.print(f"[yellow]exported again[/]: {escape(why)}", highlight=False)
    return False


def hf_config(m: Model, space: TokenSpace, max_length: int) -> Any:
    from transformers import Qwen3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(m.rope_theta)}
    if m.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": m.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return Qwen3Config(
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


def hf_weights(state: dict[str, Tensor], m: Model, space: TokenSpace) -> dict[str, Tensor]:
    """megatron-core's whole (one-rank) state dict in Qwen3's names, vocabulary padding cut off.

    Raises KeyError for a tensor that is missing or of no known use.
    """
    state = {k: v for k, v in state.items() if v is not None and not k.endswith("_extra_state")}
    group = m.num_attention_heads // m.num_query_groups
    weights = {
        "model.embed_tokens.weight": state.pop("embedding.word_embeddings.weight")[: space.size],
        "model.norm.weight": state.pop("decoder.final_layernorm.weight"),
    }
    if not m.tie_embeddings:
        weights["lm_head.weight"] = state.pop("output_layer.weight")[: space.size]
    else:
        state.pop("output_layer.weight", None)
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."

        def take(*names: str, prefix: str = ours) -> Tensor:
            for name in names:  # the local name, or where Transformer Engine keeps it
                if prefix + name in state:
                    return state.pop(prefix + name)
            raise KeyError(prefix + names[0])

        qkv = take("self_attention.linear_qkv.weight")
        qkv = qkv.view(m.num_query_groups, group + 2, m.head_dim, m.hidden_size)
        gate, up = take("mlp.linear_fc1.weight").chunk(2)
        layer = {
            "input_layernorm": take("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            "self_attn.q_proj": qkv[:, :group].reshape(-1, m.hidden_size),
            "self_attn.k_proj": qkv[:, group].reshape(-1, m.hidden_size),
            "self_attn.v_proj": qkv[:, group + 1].reshape(-1, m.hidden_size),
            "self_attn.q_norm": take("self_attention.q_layernorm.weight"),
            "self_attn.k_norm": take("self_attention.k_layernorm.weight"),
            "self_attn.o_proj": take("self_attention.linear_proj.weight"),
            "post_attention_layernorm": take("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": take("mlp.linear_fc2.weight"),
        }
        weights |= {f"{theirs}{name}.weight": tensor for name, tensor in layer.items()}
    if state:
        raise KeyError(f"not exported: {', '.join(state)}")
    return weights


def write_model(state: dict[str, Tensor], recipe: Recipe, space: TokenSpace, folder: Path) -> None:
    from transformers import Qwen3ForCausalLM

    dtype = torch.bfloat16 if recipe.precision.dtype == "bf16" else torch.float32
    config = hf_config(recipe.model, space, recipe.data.sequence_length)
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in hf_weights(state, recipe.model, space).items()}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if set(missing) - ({"lm_head.weight"} if recipe.model.tie_embeddings else set()) or unexpected:
        raise SodaError(f"{folder}: the export is not a whole Qwen3 model (missing {missing}, unknown {unexpected})")
    model.tie_weights()
    config.dtype = dtype
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = space.bos, space.eos
    model.save_pretrained(folder)


@torch.no_grad()
def compare_logits(ours: Any, folder: Path, store: Store, recipe: Recipe, documents: int = 4) -> float:
    """Largest difference of a logit over the first documents of `store`; SodaError above the tolerance."""
    from transformers import AutoModelForCausalLM

    from ..data.batch import Batcher
    from ..data.windows import Window
    from ..model.gpt import forward, inputs_of

    device = next(ours.parameters()).device
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    theirs = theirs.to(device).eval()
    ours.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums must not depend on how busy a CPU is; on CUDA this changes nothing
    worst = 0.0
    for index in range(min(documents, len(store))):
        ids = store.document(index)[: recipe.data.sequence_length + 1]
        batch = Batcher(store.space, device=device)([Window(ids, len(ids) - 1)])
        expected = forward(ours, inputs_of(ours, batch), logits=True)[..., : store.space.size].float()
        found = theirs(batch.tokens).logits.float()
        worst = max(worst, float(torch.nan_to_num((expected - found).abs(), nan=torch.inf).max()))
    torch.set_num_threads(threads)
    tolerance = TOLERANCE[recipe.precision.dtype]
    if not worst < tolerance:
        raise SodaError(f"{folder}: transformers' logits differ from ours by {worst:.3g}, more than {tolerance:g}")
    return worst


def compare_tokenizer(folder: Path, store: Store, text: TextTokenizer, documents: int = 50) -> None:
    """Documents written as strings must come back as their ids; SodaError names the first that does not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for index in range(min(documents, len(store))):
        ids = store.document(index)
        string = document_string(ids, store.space, text)
        found = tokenizer(string, add_special_tokens=False)["input_ids"]
        if not np.array_equal(found, ids):
            raise SodaError(f"{store.path}: document {index} has other ids in the exported tokenizer: {string[:80]!r}")


def _copy_codec(data: Path, folder: Path) -> None:
    for name in _CODEC:
        if (data / name).is_file():
            shutil.copyfile(data / name, folder / name)
