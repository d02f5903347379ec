"""How many parameters a model has, without building it."""

from ..config import Model
from ..vocab import TokenSpace


def parameter_count(model: Model, space: TokenSpace) -> int:
    """All parameters, both embedding tables included, vocabulary padding excluded."""
    m = model
    queries = m.num_attention_heads * m.head_dim
    keys = m.num_query_groups * m.head_dim
    attention = m.hidden_size * (queries + 2 * keys) + queries * m.hidden_size + 2 * m.head_dim
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    tables = (1 if m.tie_embeddings else 2) * space.size * m.hidden_size
    return m.num_layers * layer + m.hidden_size + tables
