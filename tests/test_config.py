import pytest

from megatron_soda.config import PRESETS, Model, load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.model.size import parameter_count
from megatron_soda.parallel.layout import check_layout
from megatron_soda.vocab import LLAMA3


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("135m", 205_149_568), ("600m", 736_698_368), ("1.7b", 2_001_871_872), ("4b", 4_374_089_216)],
)
def test_sizes_of_the_paper(preset, parameters):
    recipe = load_recipe(None, [f"model.preset={preset}"])
    assert parameter_count(recipe.model, LLAMA3) == parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=5", "Did you mean training.steps"),
        ("trainin.steps=5", "Did you mean training"),
        ("stepz=5", "unknown key stepz"),
        ("model.hiden_size=5", "Did you mean model.hidden_size"),
        ("training.steps=many", "training.steps"),
        ("training.steps=0", "training.steps=0: must be above 0"),
        ("training.steps", "section.key=value"),
        ("model=3", "model is a section"),
        ("model.preset=135", "Did you mean 135m"),
        ("training.precision=fp", "must be one of fp32, bf16, fp8"),
        ("evaluate.suite=[nil]", "Did you mean nll"),
        ("training.decay_share=0.95", "over 1 together"),
        ("prepare.test_share=1.5", r"must be in \[0, 1\)"),
        ("model.num_query_groups=3", "does not divide"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(SodaError, match=message):
        load_recipe(None, [override])


def test_recipe_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {steps: 7}\n")
    assert load_recipe(path).training.steps == 7
    assert load_recipe(path, ["training.steps=8"]).training.steps == 8
    assert load_recipe(path, ["steps=9"]).training.steps == 9  # the only key of that name
    for text, message in [
        ("trainig: {steps: 7}", "Did you mean training"),
        ("training: [1, 2]", "section"),
        ("- 1", "mapping"),
        ("a: [", "not YAML"),
        ("training: {steps: !!python/object/apply:os.getcwd []}", "not YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(SodaError, match=message):
            load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SodaError, match="cannot read"):
        load_recipe(path)
    with pytest.raises(SodaError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.num_attention_heads=4"),
        (["parallel.tensor=4"], 4, "model.num_query_groups=2"),
        (["parallel.pipeline=2"], 2, "does not divide model.num_layers=3"),
        (["parallel.tensor=2"], 3, "3 processes"),
        (["training.global_batch_size=3"], 2, "not a multiple"),
    ],
)
def test_layouts_that_do_not_divide(overrides, world, message):
    with pytest.raises(SodaError, match=message):
        check_layout(load_recipe(None, overrides), world)
    assert check_layout(load_recipe(None, []), 4) == 4


def test_presets_fill_only_what_is_not_set():
    model = load_recipe(None, ["model.preset=135m", "model.num_layers=2"]).model
    assert isinstance(model, Model)
    assert (model.num_layers, model.hidden_size) == (2, PRESETS["135m"][1])
