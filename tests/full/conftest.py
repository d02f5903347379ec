from pathlib import Path

import pytest

from tests.helpers import write_data


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_data(tmp_path / "run" / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {tmp_path}/run\ndata: {{sequence_length: 32}}\n"
        "model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, head_dim: 16}\n"
        "training: {steps: 1000, global_batch_size: 8, micro_batch_size: 2, save_every: 50, valid_every: 500,"
        " log_every: 1, epsilon: 1.0e-8}\n"
    )
    return path
