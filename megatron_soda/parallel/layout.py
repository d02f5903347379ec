"""Checks that a layout divides the model, the batch and the processes. Runs before the engine is loaded, so imports
none of it."""

from ..config import Recipe
from ..errors import SodaError
from .speed import check_speed


def check_layout(recipe: Recipe, world_size: int) -> int:
    """Returns the data-parallel size, or raises SodaError, naming what does not divide."""
    m, w, t, length = recipe.model, recipe.parallel, recipe.training, recipe.data.sequence_length

    def divides(parallel: str, size: int, key: str, value: int) -> None:
        if value % size:
            raise SodaError(f"parallel.{parallel}={size} does not divide {key}={value}")

    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        divides("tensor", w.tensor, f"model.{name}", getattr(m, name))
    divides("pipeline", w.pipeline, "model.num_layers", m.num_layers)
    divides("virtual_pipeline", w.virtual_pipeline, "model.num_layers / pipeline", m.num_layers // w.pipeline)
    if w.virtual_pipeline > 1 and w.pipeline == 1:
        raise SodaError("parallel.virtual_pipeline splits pipeline stages: it needs parallel.pipeline of 2 or more")
    if w.sequence and w.tensor == 1:
        raise SodaError("parallel.sequence works between tensor-parallel ranks: it needs parallel.tensor of 2 or more")
    check_speed(recipe)
    if w.context > 1 and length % (2 * w.context):
        raise SodaError(f"parallel.context={w.context}: data.sequence_length={length} must be a multiple of twice that")
    if w.sequence and (length // w.context) % w.tensor:
        raise SodaError(f"parallel.sequence: parallel.tensor={w.tensor} does not divide {length // w.context} tokens")
    size = w.tensor * w.pipeline * w.context
    if world_size % size:
        raise SodaError(
            f"{world_size} processes cannot be arranged as parallel.tensor={w.tensor} x parallel.pipeline={w.pipeline}"
            f" x parallel.context={w.context}: start a multiple of {size} (torchrun --nproc-per-node)"
        )
    data_parallel = world_size // size
    if t.global_batch_size % (t.micro_batch_size * data_parallel):
        raise SodaError(
            f"training.global_batch_size={t.global_batch_size} is not a multiple of training.micro_batch_size="
            f"{t.micro_batch_size} times {data_parallel} data-parallel ranks"
        )
    micro_batches = t.global_batch_size // (t.micro_batch_size * data_parallel)
    if w.virtual_pipeline > 1 and micro_batches % w.pipeline:
        raise SodaError(
            f"parallel.virtual_pipeline={w.virtual_pipeline}: the {micro_batches} micro-batches of a step must be a "
            f"multiple of parallel.pipeline={w.pipeline}; change training.global_batch_size or micro_batch_size"
        )
    if recipe.precision.dtype == "fp8":
        _check_fp8_shapes(recipe)
    return data_parallel


def token_unit(recipe: Recipe) -> int:
    """What the tokens of a micro-batch must be a multiple of, for sizes on each rank that matrix products like."""
    return _unit(recipe) * _token_ranks(recipe)


def _unit(recipe: Recipe) -> int:
    return 128 if recipe.precision.dtype == "fp8" and recipe.precision.fp8_recipe == "blockwise" else 16


def _token_ranks(recipe: Recipe) -> int:
    """Ranks that the tokens of a micro-batch are split over."""
    return recipe.parallel.context * (recipe.parallel.tensor if recipe.parallel.sequence else 1)


def _check_fp8_shapes(recipe: Recipe) -> None:
    """On every rank, each dimension of an FP8 matrix product must be a multiple of 16, or of 128 with blockwise
    scaling."""
    m, w, t, length = recipe.model, recipe.parallel, recipe.training, recipe.data.sequence_length
    if recipe.precision.bf16_layers > m.num_layers // w.pipeline:
        raise SodaError(
            f"precision.bf16_layers={recipe.precision.bf16_layers} do not fit into a stage with "
            f"{m.num_layers // w.pipeline} layers"
        )
    unit, ranks = _unit(recipe), _token_ranks(recipe)
    heads = (m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim
    for what, value, parts in (
        (
            "data.sequence_length * training.micro_batch_size (tokens of a micro-batch)",
            length * t.micro_batch_size,
            ranks,
        ),
        ("model.hidden_size", m.hidden_size, 1),
        ("model.ffn_hidden_size", m.ffn_hidden_size, w.tensor),
        ("(num_attention_heads + 2 num_query_groups) * head_dim", heads, w.tensor),
        ("num_attention_heads * head_dim", m.num_attention_heads * m.head_dim, w.tensor),
    ):
        step = unit * parts
        if value % step:
            lower, upper = value // step * step, -(-value // step) * step
            would_do = f"{lower} or {upper}" if lower else f"{upper}"
            raise SodaError(
                f"precision.dtype=fp8 ({recipe.precision.fp8_recipe}): {what} is {value}, and must be a "
                f"multiple of {unit} on each of {parts} rank(s): {would_do} would work"
            )
