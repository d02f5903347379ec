"""How many parameters a model has, and what a token costs, without building it. `soda params` prints it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import Model, Recipe
from ..data.store import Store
from ..vocab import LLAMA3, TokenSpace


@dataclass
class Size:
    """Parameters (vocabulary padding excluded) and FLOPs of a token."""

    total: int
    embedding: int  # the input table
    head: int  # the output table; 0 if it is the input one
    blocks: int  # layers and the last norm
    flops_per_token: int  # of training: see `train_flops`
    frame_flops_per_token: (
        int  # the same inside a frame with training.head_rows=legal: the head has one codebook's rows
    )
    study_flops_per_token: int  # of training, counted as the paper's IsoFLOP study does: see `study_flops`


def parameter_count(model: Model, space: TokenSpace) -> int:
    """All parameters, both embedding tables included, vocabulary padding excluded."""
    return size_of(model, space, 4096).total


def size_of(model: Model, space: TokenSpace, sequence_length: int) -> Size:
    m = model
    queries, keys = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    attention = m.hidden_size * (queries + 2 * keys) + queries * m.hidden_size + 2 * m.head_dim
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    table = space.size * m.hidden_size
    blocks = m.num_layers * layer + m.hidden_size
    head = 0 if m.tie_embeddings else table
    return Size(
        total=blocks + table + head,
        embedding=table,
        head=head,
        blocks=blocks,
        flops_per_token=train_flops(model, space, sequence_length),
        frame_flops_per_token=train_flops(model, space, sequence_length, space.entries),
        study_flops_per_token=study_flops(model, space, sequence_length),
    )


def train_flops(model: Model, space: TokenSpace, sequence_length: int, head_rows: int | None = None) -> int:
    """Forward and backward FLOPs of a token: 6 for every weight of a matrix product, the head's too, and attention over
    the half of the window that lies before a token: 6 * length * heads * head_dim a layer. The MFU uses this. What
    is computed twice (recomputation) and norms, rotary positions and softmax do not count. `head_rows`: the head's rows
    at a position, if not all (training.head_rows)."""
    m = model
    queries, keys = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    products = m.hidden_size * (2 * queries + 2 * keys) + 3 * m.hidden_size * m.ffn_hidden_size
    return 6 * (m.num_layers * (products + sequence_length * queries) + (head_rows or space.size) * m.hidden_size)


def study_flops(model: Model, space: TokenSpace, sequence_length: int, head_rows: int = 0) -> int:
    """The same as the authors' code counts it (section 6: Levanter's lm_flops_per_token, times 3 for the backward
    pass): attention over the whole window, the query projection taken as hidden x hidden, softmax included.
    `head_rows`: as above; 0: all."""
    m = model
    keys = m.num_query_groups * m.head_dim
    layer = (
        6 * m.hidden_size * m.ffn_hidden_size
        + 2 * m.hidden_size * (m.hidden_size + 2 * keys)
        + 2 * m.hidden_size**2
        + 4 * sequence_length * m.hidden_size
        + 3 * sequence_length * m.num_attention_heads
    )
    return 3 * (m.num_layers * layer + 2 * m.hidden_size * (head_rows or space.size))


def space_of(recipe: Recipe) -> TokenSpace:
    """The vocabulary of the recipe's data if that is there, else SODA's 144,644 ids."""
    path = next(iter(recipe.data.corpora.values()), str(recipe.data_folder / "train"))
    return Store(path).space if Path(f"{path}.json").is_file() else LLAMA3


def training_tokens(recipe: Recipe) -> int | None:
    """Training tokens of all corpora; None if the stores are not there."""
    named = recipe.data.corpora or {"train": str(recipe.data_folder / "train")}
    if not all(Path(f"{path}.json").is_file() for path in named.values()):
        return None
    return sum(Store(path).size for path in named.values())


def sizes(model: Model, space: TokenSpace, sequence_length: int) -> dict[str, int]:
    return asdict(size_of(model, space, sequence_length))
