"""Compares an export with its checkpoint, logits and tokenizer, before it is done.

Neither model is ever in memory as a whole: a layer has its weights only while it runs, ours from the checkpoint, theirs
from the files that were written. Both run in float32, so that bf16 models are compared as closely as others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Recipe
from ..config.training import Precision
from ..data.batch import Batch, Batcher
from ..data.store import Store
from ..data.windows import Window
from ..errors import SodaError
from ..parallel import ranks
from ..tokenizer import TextTokenizer, document_string
from ..training.checkpoint_stream import TensorReader
from ..vocab import TokenSpace
from .weights import Weights

TOLERANCE = 1e-4  # of a logit up to 10; in proportion above
DOCUMENTS, LENGTH = 4, 512  # the first tokens of the first documents
LOGITS = 1 << 25  # compared at most

_IN_CHECKPOINTS = {  # local layers' names: checkpoints have Transformer Engine's
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
}
Fetch = Callable[[], dict[str, Tensor]]  # a module's weights by their names in it


@torch.no_grad()
def compare_logits(
    recipe: Recipe, space: TokenSpace, checkpoint: Path, folder: Path, documents: list[np.ndarray]
) -> float:
    """The largest difference between a logit of the checkpoint's model and one of the export in `folder`, at the
    beginning of `documents`. SodaError above the tolerance."""
    alone = recipe.on_one_rank()
    alone = replace(alone, precision=Precision(), training=replace(alone.training, backend="local"))
    device = ranks.init(alone)
    batch, real = _batch(space, documents, device)
    rows = real.nonzero()
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), max(1, LOGITS // space.size))).long()]
    weights = Weights(folder)
    with _one_thread():
        ours = _our_logits(alone, space, checkpoint, weights, batch, rows)
        theirs = _their_logits(folder, weights, batch, rows)
    worst = float(torch.nan_to_num((ours - theirs).abs(), nan=torch.inf).max())
    tolerance = TOLERANCE * max(1.0, float(ours.abs().max()) / 10)
    if not worst < tolerance:
        raise SodaError(f"{folder}: transformers' logits differ from ours by {worst:.3g}, more than {tolerance:.3g}")
    return worst


def _batch(space: TokenSpace, documents: list[np.ndarray], device: torch.device) -> tuple[Batch, Tensor]:
    """The beginnings of the documents, padded with EOS, and which tokens (documents, length) are not padding."""
    some = [document[: LENGTH + 1] for document in documents[:DOCUMENTS]]
    longest = max(2, *map(len, some))
    ids = np.full((len(some), longest), space.eos, np.int32)
    for row, document in zip(ids, some, strict=True):
        row[: len(document)] = document
    batch = Batcher(space, device=device)([Window(row, longest - 1) for row in ids])
    lengths = torch.tensor([max(1, len(document) - 1) for document in some], device=device)
    return batch, torch.arange(longest - 1, device=device) < lengths[:, None]


def _our_logits(
    recipe: Recipe, space: TokenSpace, checkpoint: Path, weights: Weights, batch: Batch, rows: Tensor
) -> Tensor:
    """float32 (rows, vocabulary), with weights rounded to the exported format."""
    from ..model.gpt import build_model, forward, inputs_of

    model, m, device = build_model(recipe, space, torch.device("meta")).eval(), recipe.model, batch.tokens.device
    reader = TensorReader(checkpoint)

    def weight(name: str, layer: int | None) -> Tensor:
        tensor = reader.read(_IN_CHECKPOINTS.get(name, name), layer).float()
        for rows in tensor.split(1 << 12) if weights.dtype != torch.float32 else ():
            rows.copy_(rows.to(weights.dtype))  # a few at a time: a table is large
        return tensor

    def of(prefix: str, layer: int | None = None) -> Fetch:
        names = [name for name, _ in model.get_submodule(prefix).named_parameters()]
        begin = prefix if layer is None else "decoder.layers"
        return lambda: {name: weight(f"{begin}.{name}", layer) for name in names}

    for prefix in ("embedding", "decoder.final_layernorm"):
        _fill_when_called(model.get_submodule(prefix), of(prefix), device)
    for layer, module in enumerate(model.decoder.layers):
        _fill_when_called(module, of(f"decoder.layers.{layer}", layer), device)
    hidden = forward(model, inputs_of(model, batch)).transpose(0, 1)[tuple(rows.T)]
    head = weight("embedding.word_embeddings.weight" if m.tie_embeddings else "output_layer.weight", None)
    return hidden @ head[: space.size].to(device).T


def _their_logits(folder: Path, weights: Weights, batch: Batch, rows: Tensor) -> Tensor:
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config: Any = Qwen3Config.from_pretrained(folder, local_files_only=True)
    config.dtype = torch.float32
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config).eval()
    device = batch.tokens.device
    model.model.rotary_emb = Qwen3RotaryEmbedding(config).to(device)  # computed, not loaded

    def of(prefix: str) -> Fetch:
        names = [name for name in weights.shapes if name.startswith(prefix)]
        return lambda: {name.removeprefix(prefix): weights.read(name).float() for name in names}

    for prefix in (
        "model.embed_tokens.",
        "model.norm.",
        *(f"model.layers.{i}." for i in range(len(model.model.layers))),
    ):
        _fill_when_called(model.get_submodule(prefix[:-1]), of(prefix), device)
    head = "model.embed_tokens." if config.tie_word_embeddings else "lm_head."
    _fill_when_called(model.lm_head, of(head), device)
    return model.lm_head(model.model(batch.tokens, use_cache=False).last_hidden_state[tuple(rows.T)])


def _fill_when_called(module: torch.nn.Module, fetch: Fetch, device: torch.device) -> None:
    """Gives a module on the meta device its weights while it runs."""
    empty = dict(module.named_parameters())

    def put(parameters: dict[str, Any]) -> None:
        if parameters.keys() != empty.keys():
            raise ValueError(f"weights {sorted(parameters)} for {sorted(empty)}")
        for name, parameter in parameters.items():
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._parameters[last] = parameter

    def fill(*_: Any) -> None:
        put({n: torch.nn.Parameter(t.to(device), requires_grad=False) for n, t in fetch().items()})

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(lambda *_: put(empty))  # type: ignore[func-returns-value]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums must not depend on how busy a CPU is; on CUDA this changes nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def example_documents(space: TokenSpace, seed: int = 0) -> list[np.ndarray]:
    """Documents of random text and codes, for a model without data."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(DOCUMENTS):
        text = draw.integers(0, space.text_size, 40)
        text = text[(text != space.bos) & (text != space.eos)]
        codes = space.audio_ids(draw.integers(0, space.entries, (20, space.codebooks)))
        spans = [space.text_start, *text, space.text_end], [space.audio_start, *codes, space.audio_end]
        made.append(np.array([space.bos, *spans[0], *spans[1], space.eos], np.int32))
    return made


def compare_tokenizer(folder: Path, store: Store, text: TextTokenizer, documents: int = 50) -> None:
    """Documents written as strings must come back as their ids; SodaError names the first that does not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for index in range(min(documents, len(store))):
        ids = store.document(index)
        string = document_string(ids, store.space, text)
        found = tokenizer(string, add_special_tokens=False)["input_ids"]
        if not np.array_equal(found, ids):
            raise SodaError(f"{store.path}: document {index} has other ids in the exported tokenizer: {string[:80]!r}")
