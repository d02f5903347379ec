"""The model card says what a user must know about how the model was trained."""

import pytest

from megatron_soda.config import load_recipe
from megatron_soda.hf.card import model_card
from tests.helpers import SPACE


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["training.head_rows=legal"], "with no others"),
        (["training.head_rows=legal", "training.head_other_share=0.0625"], "a sample of 6.2% of the others"),
    ],
)
def test_which_rows_the_softmax_was_over(overrides, said):
    card = model_card(load_recipe(None, ["model.preset=tiny", *overrides]), SPACE, {"step": 3}, {})
    assert ("decode within the grammar" in card) == bool(said)
    assert said is None or said in card
