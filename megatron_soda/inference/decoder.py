"""The forward pass of a Qwen3 for decoding: a token at a time for a batch, with a key-value cache allocated once.

It uses the weights of a transformers Qwen3ForCausalLM where they lie. The head is applied separately, to the rows that
are needed: inside an audio frame that is one codebook out of 144,644 rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .. import ops
from ..errors import SodaError
from ..ops import library

FEW = 32  # vectors up to which csrc's product is faster than torch's
Weights = Literal["", "bf16", "int8"]


@dataclass
class Cache:
    """Keys and values of a batch, (layers, rows, groups, room, head_dim) each. A row's tokens begin at index 0; what
    lies behind its length is never attended to."""

    keys: Tensor
    values: Tensor
    lengths: Tensor  # int64 (rows,)
    longest: int

    def select(self, rows: list[int]) -> "Cache":
        """A cache of some of the rows, or of copies of them."""
        index = torch.tensor(rows, device=self.lengths.device)
        return Cache(self.keys[:, index], self.values[:, index], self.lengths[index], self.longest)


class Decoder:
    """Decodes with `model`, a transformers Qwen3ForCausalLM, on its device and in its dtype.

    weights: "bf16" or "int8" decodes with copies of the matrices in this format, for the speed of the CPU's memory, and
    computes in float32. Empty: with the model's own.

    Raises SodaError for rotary positions that depend on the length of the sequence, and for `weights` on a GPU.
    """

    def __init__(self, model: Any, weights: Weights = "") -> None:
        config, self._embedding = model.config, model.model.embed_tokens.weight
        kind = config.rope_parameters["rope_type"]
        if kind not in ("default", "llama3"):
            raise SodaError(f"rotary positions of type {kind!r}: only default and llama3 can be decoded")
        self.context: int = config.max_position_embeddings  # tokens
        self.device: torch.device = self._embedding.device
        if weights and self.device.type != "cpu":
            raise SodaError(f"generate.weights={weights}: is for decoding on a CPU, but this model is on {self.device}")
        self._dtype = torch.float32 if weights else self._embedding.dtype
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._size: int = config.head_dim
        self._eps: float = config.rms_norm_eps
        self._layers = [_Layer(layer, weights) for layer in model.model.layers]
        norm = model.model.norm.weight.detach()
        self._norm, self._head = norm.float() if weights else norm, _Matrix(model.lm_head.weight, weights)
        rotary = model.model.rotary_emb
        self._frequencies, self._scale = rotary.inv_freq.float(), rotary.attention_scaling
        self._angles = self._rotations(0)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], room: int) -> tuple[Tensor, Cache]:
        """Hidden states of each prompt's last token, (rows, hidden), and a cache with room for `room` more tokens.

        The prompts may differ in length. Raises ValueError if one is empty or too long for the model's context.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        if not min(lengths):
            raise ValueError("a prompt is empty")
        if longest > self.context:
            raise ValueError(f"a prompt has {longest} tokens, but the model's context is {self.context}")
        # Padded on the right: no token attends to the padding, which generated tokens overwrite in the cache.
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        cache = self._empty(lengths, longest + room)
        x = self._embedding[ids.flatten()].to(self._dtype)
        rotation = self._rotations(longest)[:, :longest].repeat(1, len(prompts), 1)
        for number, layer in enumerate(self._layers):
            x = self._layer(layer, x, rotation, lambda q, k, v, n=number: self._attend_all(q, k, v, cache, n))
        last = torch.arange(len(prompts), device=self.device) * longest + cache.lengths - 1
        return self._normed(x[last], self._norm), cache

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """Adds a token to each row, int64 (rows,). -> hidden states of these tokens, (rows, hidden)."""
        x = self._embedding[ids].to(self._dtype)
        rotation = self._rotations(cache.longest + 1)[:, cache.lengths]
        cache.longest += 1
        for number, layer in enumerate(self._layers):
            x = self._layer(
                *(layer, x, rotation),
                lambda q, k, v, n=number: ops.attend(
                    q, k, v, cache.keys[n], cache.values[n], cache.lengths, cache.longest
                ),
            )
        cache.lengths += 1
        return self._normed(x, self._norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """float32 (rows, end - first): the logits of the ids from `first` to before `end`, by default all."""
        return self._head.rows(first, end)(hidden).float()

    def _layer(self, layer: "_Layer", x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """x: (tokens, hidden). rotation: (2, tokens, head_dim)."""
        y = self._normed(x, layer.before_attention)
        q, k, v = (matrix(y).unflatten(-1, (-1, self._size)) for matrix in (layer.q, layer.k, layer.v))
        q = ops.norm_and_rotate(q, layer.q_norm, self._eps, rotation)
        k = ops.norm_and_rotate(k, layer.k_norm, self._eps, rotation)
        x = x + layer.o(attend(q, k, v))
        y = self._normed(x, layer.before_mlp)
        return x + layer.down(F.silu(layer.gate(y)).mul_(layer.up(y)))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.norm_and_rotate(x[:, None], weight, self._eps)[:, 0]

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, layer: int) -> Tensor:
        """Within the prompts: (rows * length, heads or groups, head_dim) -> (rows * length, heads * head_dim)."""
        q, k, v = (part.unflatten(0, (len(cache.lengths), -1)).transpose(1, 2) for part in (q, k, v))
        cache.keys[layer, :, :, : k.shape[2]] = k
        cache.values[layer, :, :, : k.shape[2]] = v
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self._heads != self._groups)
        return found.transpose(1, 2).flatten(2).flatten(0, 1)

    def _rotations(self, length: int) -> Tensor:
        """(2, length or more, head_dim): cosines and signed sines of every position, in the model's dtype."""
        if not length or length > self._angles.shape[1]:
            positions = torch.arange(max(2 * length, 1024), device=self.device, dtype=torch.float32)
            angles = positions[:, None] * self._frequencies
            cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
            found = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])
            self._angles = found.to(self._dtype)
        return self._angles

    def _empty(self, lengths: list[int], room: int) -> Cache:
        shape = 2, len(self._layers), len(lengths), self._groups, room, self._size
        keys, values = torch.zeros(shape, dtype=self._dtype, device=self.device)
        return Cache(keys, values, torch.tensor(lengths, device=self.device), max(lengths))


class _Matrix:
    """A linear layer of weights (out, in): x (rows, in) -> (rows, out)."""

    def __init__(self, weight: Tensor, weights: Weights = "", scale: Tensor | None = None) -> None:
        self._weight, self._scale = weight.detach(), scale
        if weights == "int8":
            self._weight, self._scale = ops.quantise_rows(self._weight)
        elif weights == "bf16":
            self._weight = self._weight.bfloat16()

    def rows(self, first: int, end: int | None) -> "_Matrix":
        """Some of the rows, nothing copied."""
        return _Matrix(self._weight[first:end], scale=None if self._scale is None else self._scale[first:end])

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight
        few = len(x) <= FEW and weight.dtype == torch.float32 and library.find("linear", weight.device.type)
        if weight.dtype == x.dtype and not few:
            return F.linear(x, weight)
        return ops.linear(x, weight, self._scale)


class _Layer:
    """A layer's weights. Norms are as precise as what they are applied to."""

    def __init__(self, layer: Any, weights: Weights) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o = (_Matrix(getattr(attention, f"{x}_proj").weight, weights) for x in "qkvo")
        self.gate, self.up = _Matrix(mlp.gate_proj.weight, weights), _Matrix(mlp.up_proj.weight, weights)
        self.down = _Matrix(mlp.down_proj.weight, weights)
        norms = layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm
        self.before_attention, self.q_norm, self.k_norm, self.before_mlp = (
            norm.weight.detach().float() if weights else norm.weight.detach() for norm in norms
        )
