"""The SODA decoder as megatron-core's GPTModel, with weights that do not depend on the layout."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..config import Recipe
from ..config.training import Precision
from ..data.batch import Batch
from ..parallel.context import attention_mask, cut, cut_sequences, part_of_documents
from ..parallel.layout import token_unit
from ..parallel.speed import choose_backend, choose_speed
from ..vocab import TokenSpace
from .legal_rows import LegalRows, Piece
from .rows import TABLES, Rows
from .specs import layer_spec


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Qwen3 style: RMSNorm, SwiGLU, GQA, QK-norm, RoPE, no biases (paper, section 3)."""
    m, p, t = recipe.model, recipe.parallel, recipe.training
    dtype = torch.float32 if recipe.precision.dtype == "fp32" else torch.bfloat16
    cuda = torch.cuda.is_available()
    speed = choose_speed(recipe)
    interleaved = p.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # initialise() below fills the weights; but it is this step that marks which are cut across ranks.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if interleaved else None,
        context_parallel_size=p.context,
        sequence_parallel=p.sequence,
        # In the interleaved schedule of two stages a rank sends both ways to the same peer; batched, the two get mixed
        # up and gradients are silently wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # losses are sums; the gradient is divided by the global sum of weights
        batch_p2p_sync=cuda,
        recompute_granularity="full" if t.recompute else None,
        recompute_method="uniform" if t.recompute else None,
        recompute_num_layers=1 if t.recompute else None,
        use_te_activation_func=bool(speed.fuse_swiglu),  # specs.SwiGLU
        # Else rotary positions of packed sequences are applied document by document, each waiting for the device.
        apply_rope_fusion=bool(speed.fuse_rope),
        tp_comm_overlap=speed.overlap_tensor,
        **({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "mlp"} if speed.cuda_graphs else {}),
        # Fusions that need apex or a compiler; and accumulate_in_place() does the last of them.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(_fp8(recipe.precision) if recipe.precision.dtype == "fp8" else {}),
    )


def _fp8(precision: Precision) -> dict[str, Any]:
    """Transformer Engine's FP8: E4M3 forward, E5M2 for gradients. The head is ours and never in FP8."""
    settings: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": precision.fp8_recipe}
    if precision.fp8_recipe == "delayed":  # scales from the highest values of the steps before
        settings.update(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    if precision.bf16_layers:
        settings.update(
            first_last_layers_bf16=True,
            num_layers_at_start_in_bf16=precision.bf16_layers,
            num_layers_at_end_in_bf16=precision.bf16_layers,
        )
    return settings


def _leave(weight: Tensor) -> Tensor:
    return weight


class SodaModel(GPTModel):
    """GPTModel that ends with the hidden states: the head is part of the loss (head.py). `with_head` brings logits."""

    with_head = False
    packed = False  # documents are given as packed sequences, not by a mask: to Transformer Engine
    token_unit = 1  # if they are split between ranks, what the tokens of a batch are a multiple of
    reset_positions = False  # the recipe's. Packed documents always count from their start, which attention cannot tell
    rows: Rows  # of the embedding and the head
    row_of_id: Tensor | None = None  # int64 (vocabulary,); None: a row's number is its id

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._postprocess(hidden_states, *args, **kwargs) if self.with_head else hidden_states

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        if self.rows.ranks > 1:
            rank = parallel_state.get_tensor_model_parallel_rank()
            tables = {name: tensor for name, tensor in state.items() if tensor.key in TABLES}
            state.update({name: in_order_of_ids(tensor, self.rows, rank) for name, tensor in tables.items()})
        return state


def in_order_of_ids(part: ShardedTensor, rows: Rows, rank: int) -> ShardedTensorFactory:
    """How checkpoints store a rank's part of a table, and Adam's state for it: each block at the place of its ids, and
    no padding. Tables with padding (of one rank, or written by an older version) are read as well."""
    blocks = [block for block in rows.blocks(rank) if block]
    sizes = [len(block) for block in blocks]

    @torch.no_grad()
    def build(key: str, data: Tensor, replica: Any, _: slice | None) -> list[ShardedTensor]:
        return [
            ShardedTensor(
                key,
                some,
                some.dtype,
                local_shape=tuple(some.shape),
                global_shape=(rows.space.size, some.shape[1]),
                global_offset=(block.start, 0),
                axis_fragmentations=None,  # the blocks of the ranks differ in size
                replica_id=replica,
                allow_shape_mismatch=True,
            )
            for block, some in zip(blocks, data[: sum(sizes)].split(sizes), strict=True)
        ]

    factory: Any = ShardedTensorFactory
    return factory(part.key, part.data, build, rows.join, part.replica_id)


class Rotary(torch.nn.Module):
    """Rotary positions of tokens that need not be 0, 1, 2, ..: a part of a sequence, or counted by document."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        self.position_id = torch.zeros(1, 1)  # (1 or batch, length); set before every forward pass

    def get_rotary_seq_len(self, *_: Any) -> int:
        return self.position_id.shape[1]

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """(length, 1 or batch, 1, head_dim), angles."""
        self.inv_freq = self.inv_freq.to(self.position_id.device)
        angles = self.position_id.t()[..., None] * self.inv_freq
        return torch.cat([angles, angles], -1)[:, :, None]


def build_model(recipe: Recipe, space: TokenSpace, device: torch.device, chunk: int | None = None) -> SodaModel:
    """This rank's part of the model, initialised, on `device`. `chunk`: of this pipeline stage, if it has several.

    On torch's device "meta" it has no weights, and takes no memory: for those who fill it a layer at a time.
    """
    config = transformer_config(recipe)
    m = recipe.model
    backend, rows = choose_backend(recipe.training.backend), Rows(space, recipe.parallel.tensor)
    model = SodaModel(
        config=config,
        transformer_layer_spec=layer_spec(backend, config, chunk),
        vocab_size=rows.local * rows.ranks,
        max_sequence_length=recipe.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        share_embeddings_and_output_weights=bool(m.tie_embeddings),
        position_embedding_type="rope",
        rotary_base=m.rope_theta,
        rope_scaling=m.rope_scaling_factor != 1.0,
        rope_scaling_factor=m.rope_scaling_factor,
        vp_stage=chunk,
    )
    model.packed, model.token_unit = backend == "transformer_engine", token_unit(recipe)
    model.reset_positions = recipe.data.reset_positions
    model.rows, model.row_of_id = rows, rows.of_ids().to(device) if rows.ranks > 1 else None
    if not model.packed:
        stock: Any = model.rotary_pos_emb
        setattr(model, "rotary_pos_emb", Rotary(stock.inv_freq))  # noqa: B010  a module of another class
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if device.type != "meta":
        initialise(model, space, recipe)
    return model.to(device=device, dtype=config.params_dtype)


@torch.no_grad()
def initialise(model: GPTModel, space: TokenSpace, recipe: Recipe) -> None:
    """Matrices as `model.init` says, ones for norms, zeros for padded vocabulary rows; and the model's class stds.

    Every tensor is drawn whole from a generator seeded by its global name, then cut as megatron-core cuts it (or, a
    table, as Rows does), so a run starts from the same model at every layout.
    """
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    rows = Rows(space, size)
    parameters: Any = model.named_parameters()
    for name, parameter in parameters:
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        name = global_name(model, name)
        axis = parameter.partition_dim if parameter.tensor_model_parallel else -1
        shape = list(parameter.shape)
        if axis >= 0:
            shape[axis] *= size
        if name in TABLES:
            shape[0] = space.size
        full = _draw(shape, name, recipe)
        if name in TABLES:
            m = recipe.model
            class_std = m.embedding_class_std if name.startswith("embedding.") else m.head_class_std
            of_class = _normal([len(space.class_names), shape[1]], class_std, f"{recipe.seed}/{name}/classes")
            full += of_class[torch.from_numpy(space.class_table()).long()]
            full = rows.cut(full, rank)
        elif axis >= 0:
            # SwiGLU's two matrices lie in one tensor, and each rank holds a part of both.
            parts = full.chunk(2, 0) if "linear_fc1" in name else (full,)
            full = torch.cat([part.chunk(size, axis)[rank] for part in parts])
        parameter.copy_(full)


def _draw(shape: list[int], name: str, recipe: Recipe) -> Tensor:
    """A whole matrix (rows, fan-in) or (vocabulary, width), float32.

    normal: N(0, init_std). levanter: a standard normal cut off at 3, times 1 / sqrt(fan-in), the embedding times
    1 / width. Q, K and V have one fan-in, and so have gate and up, so drawing them fused changes nothing.
    """
    if recipe.model.init == "normal":
        return _normal(shape, recipe.model.init_std, f"{recipe.seed}/{name}")
    scale = shape[1] ** (-1.0 if name.startswith("embedding.") else -0.5)
    if name == "output_layer.weight":  # Levanter draws both from one key: the head starts as the scaled embedding
        name = "embedding.word_embeddings.weight"
    standard = torch.empty(shape, dtype=torch.float32)
    return torch.nn.init.trunc_normal_(standard, a=-3, b=3, generator=generator_of(f"{recipe.seed}/{name}")).mul_(scale)


def _normal(shape: list[int], std: float, name: str) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).normal_(std=std, generator=generator_of(name))


def generator_of(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def global_name(model: Any, name: str) -> str:
    """`decoder.layers.0.…` of a later pipeline stage -> the number the layer has in the whole model."""
    prefix = "decoder.layers."
    if name.startswith(prefix):
        local, _, rest = name[len(prefix) :].partition(".")
        return f"{prefix}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
    tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
    return "embedding.word_embeddings.weight" if tied else name


@dataclass
class Inputs:
    """What this rank takes of a batch."""

    batch: Batch  # its part (context.py); tokens and labels as rows (rows.py); `cu_seqlens` are the whole batch's
    mask: Tensor | None  # bool (sequences, 1, queries, keys), True where attention may look; None: packed sequences
    pieces: list[Piece] | None = None  # what the head is to compute; None: everything, over all rows

    def tensors(self) -> list[Tensor]:
        pieces = [piece.index for piece in self.pieces or []]
        return [x for x in (*vars(self.batch).values(), self.mask, *pieces) if isinstance(x, Tensor)]


def inputs_of(
    model: SodaModel, batch: Batch, legal: LegalRows | None = None, others: bool = False, tokens: int = 0
) -> Inputs:
    """Attention stays inside documents: by a mask in the local modules, by packed sequences in Transformer Engine
    (which ignores masks). `legal`: the head is over the rows that the grammar allows, and with `others` over a sample
    of the rest. `tokens`: packed documents that are split between ranks are padded to so many at least."""
    mask = None if model.packed else attention_mask(batch.segment_id)
    part = part_of_documents(batch, model.token_unit, tokens) if model.packed else None
    mine = cut(batch, part)
    if model.row_of_id is not None:
        mine = replace(mine, tokens=model.row_of_id[mine.tokens], labels=model.row_of_id[mine.labels])
    if legal is None:
        return Inputs(mine, mask)
    group = flat(model, cut_sequences(legal.groups(batch), part))
    turn = legal.turn(batch) if others else None
    return Inputs(mine, mask, legal.pieces(group, flat(model, mine.loss_weight), turn))


def flat(model: SodaModel, x: Tensor) -> Tensor:
    """(sequences, length), in the order of the hidden states: by sequence if packed, else by position."""
    return (x if model.packed else x.t()).reshape(-1)


def forward(model: Any, inputs: Inputs, *, logits: bool = False) -> Tensor:
    """Hidden states (length of this rank, sequences, hidden_size) of this stage; packed: (tokens of this rank, 1, ..).

    `logits`: on the last stage (sequences, length, rows of this rank) instead, padding included.
    """
    module: SodaModel = getattr(model, "module", model)
    module.with_head = logits and module.post_process
    batch = inputs.batch
    if not module.packed:
        rotary: Any = module.rotary_pos_emb
        rotary.position_id = batch.position_id if module.reset_positions else batch.position_id[:1]
        return model(batch.tokens, batch.position_id, inputs.mask)
    # Between context-parallel ranks Transformer Engine wants padded lengths, too. The same tensor says that nothing is
    # between sequences: partition.py.
    padded: Any = batch.cu_seqlens if module.config.context_parallel_size > 1 else None
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
    )
    flat = batch.tokens.reshape(1, -1), batch.position_id.reshape(1, -1)
    output = model(*flat, None, packed_seq_params=packed)
    return output.view(*batch.tokens.shape, -1) if module.with_head else output


def head_weight(model: Any) -> Tensor | None:
    """The head's rows of this rank: its own, or those of the tied embedding. None where the model does not end."""
    module: SodaModel = getattr(model, "module", model)
    if not module.post_process:
        return None
    weight = module.shared_embedding_or_output_weight() if module.share_embeddings_and_output_weights else None
    return module.output_layer.weight if weight is None else weight
