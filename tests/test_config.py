import importlib.util
import json
from pathlib import Path

import pytest

from megatron_soda.config import Model, load_recipe, save_recipe
from megatron_soda.config.data import MixStage
from megatron_soda.config.loading import recipe_schema
from megatron_soda.config.model import PRESETS
from megatron_soda.config.renamed import RENAMED
from megatron_soda.config.yaml_files import read_yaml
from megatron_soda.errors import SodaError
from megatron_soda.model.size import parameter_count, size_of
from megatron_soda.parallel.layout import check_layout, token_unit
from megatron_soda.parallel.speed import choose
from megatron_soda.vocab import LLAMA3


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("135m", 205_149_568),
        ("600m", 736_698_368),
        ("1.7b", 2_001_871_872),
        ("4b", 4_374_089_216),
        ("150m", 20 * (4 * 512 * 512 + 3 * 512 * 1792 + 2 * 64 + 2 * 512) + 512 + 144_644 * 512),
    ],
)
def test_sizes_of_the_paper(preset, parameters):
    recipe = load_recipe(None, [f"model.preset={preset}"])
    assert parameter_count(recipe.model, LLAMA3) == parameters


# Millions, both tables: the appendix of the paper's study, regenerated from the authors' code (width: blocks, total).
STUDY = {
    256: (3.1, 77.2), 384: (9.4, 120.5), 512: (25.2, 173.3), 640: (45.9, 231.0), 768: (75.5, 297.7),
    896: (115.6, 374.8), 1024: (184.6, 480.8), 1152: (254.8, 588.1), 1280: (340.8, 711.1), 1408: (444.1, 851.4),
    1536: (566.3, 1010.6),
    1664: (753.2, 1234.6), 1792: (924.9, 1443.3), 1920: (1120.7, 1676.2), 2048: (1342.3, 1934.7),
    2304: (1953.6, 2620.1),
    2816: (3425.8, 4240.5), 3072: (4530.0, 5418.7),
}  # fmt: skip


@pytest.mark.parametrize("width", STUDY)
def test_models_of_the_study(width):
    size = size_of(load_recipe(None, [f"preset=isoflop-{width}"]).model, LLAMA3, 4096)
    assert (size.blocks / 1e6, size.total / 1e6) == pytest.approx(STUDY[width], abs=0.06)


@pytest.mark.parametrize("preset", [*PRESETS, "isoflop-640"])
def test_sizes_against_transformers(preset):
    """A Qwen3 of the same sizes on the meta device, whose parameters are counted."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_soda.hf.qwen3 import hf_config

    recipe = load_recipe(None, [f"preset={preset}"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(recipe.model, LLAMA3, 4096))
    size = size_of(recipe.model, LLAMA3, 4096)
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.embedding == model.model.embed_tokens.weight.numel()
    assert size.head == (0 if recipe.model.tie_embeddings else model.lm_head.weight.numel())
    products = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    attention = recipe.model.num_layers * 4096 * recipe.model.num_attention_heads * recipe.model.head_dim
    assert size.flops_per_token == 6 * (products + attention + size.embedding)


def test_budgets_of_the_study():
    """Tokens of a row of its table times the FLOPs of a token are the row's budget (paper, section 6)."""
    for budget, width, steps, batch in [(3e18, 512, 61262, 16), (3e19, 1152, 35628, 64), (3e20, 1920, 56132, 128)]:
        size = size_of(load_recipe(None, [f"preset=isoflop-{width}"]).model, LLAMA3, 4096)
        assert size.study_flops_per_token * steps * batch * 4096 == pytest.approx(budget, rel=0.01)


def test_who_draws_the_weights():
    """The paper's models as its library does, others with one standard deviation, unless the recipe says."""
    from megatron_soda.hf.qwen3 import hf_config

    for preset in [*PRESETS, "isoflop-640"]:
        model = load_recipe(None, [f"preset={preset}"]).model
        assert model.init == ("normal" if preset == "tiny" else "levanter")
        assert hf_config(model, LLAMA3, 4096).initializer_range == 0.02  # as in the authors' exports
    assert load_recipe(None, ["model.init=levanter"]).model.init == "levanter"
    assert load_recipe(None, ["preset=135m", "model.init=normal", "init_std=0.01"]).model.init_std == 0.01


def test_learning_rates_of_the_paper():
    for preset, rate in [("135m", 4.243e-3), ("600m", 4.243e-3), ("1.7b", 3.0e-3), ("4b", 2.683e-3)]:
        assert load_recipe(None, [f"preset={preset}"]).optimizer.learning_rate == pytest.approx(rate, rel=1e-3)
    assert load_recipe(None, ["optimizer.learning_rate=1e-3"]).optimizer.learning_rate == 1e-3


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
        ("precision.dtype=fp", "must be one of fp32, bf16, fp8"),
        ("evaluate.suite=[nil]", "Did you mean nll"),
        ("evaluate.during_training=[nil]", "Did you mean nll"),
        ("evaluate={every: 250, during_training: []}", "names no suite"),
        ("evaluate.every=300", "must be a multiple of checkpoint.save_every=250"),
        ("schedule.decay_share=0.95", "add up to more than 1"),
        ("schedule.final_share=0.1", "is for schedule.name=cosine; wsd ends at 0"),
        ("data.prompt_spans=1", "needs data.pack=true"),
        ("data={pack: true, align_windows: true}", "nothing to align"),
        ("model.preset=isoflop-100", "multiple of 128"),
        ("optimizer.name=adam", "Did you mean adamw"),
        ("model.init=levantr", "Did you mean levanter"),
        ("model={init: levanter, init_std: 0.1}", "init_std is for model.init=normal"),
        ("schedule.name=decay", "training.branch_from"),
        ("schedule.name=wds", "Did you mean wsd"),
        ("optimizer.learning_rate=-1", "0 or above"),
        ("optimizer.learning_rate=nan", "a finite number"),
        ("optimizer.learning_rate=inf", "a finite number"),
        ("optimizer.epsilon=0", "above 0"),
        ("training.loss_weights={text: -1}", r"loss_weights\.text=-1"),
        ("checkpoint.keep_last=-1", "keep_last=-1"),
        ("parallel.contxt=2", "Did you mean parallel.context"),
        ("parallel.context=0", "above 0"),
        ("data.mix=[{from_step: 0, shares: {a: 1.0}}]", "data.corpora has no corpora"),
        ("data.mix=[{from_stp: 0}]", r"data\.mix\[0\]\.from_stp.*from_step"),
        ("data.mix=[3]", "from_step and shares"),
        ("data.corpora={a: x, b: y}", "data.mix must give"),
        ("precision.bf16_layers=1", "needs precision.dtype=fp8"),
        ("prepare.test_share=1.5", "must be below 1"),
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


FP8, BF16 = ["precision.dtype=fp8"], ["precision.dtype=bf16"]
DISTRIBUTED = ["parallel.distributed_optimizer=true"]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.num_attention_heads=4"),
        (["parallel.tensor=4"], 4, "model.num_query_groups=2"),
        (["parallel.pipeline=2"], 2, "does not divide model.num_layers=3"),
        (["parallel.tensor=2"], 3, "3 processes"),
        (["training.global_batch_size=3"], 2, "not a multiple"),
        (["parallel.sequence=true"], 1, "parallel.tensor of 2"),
        (["parallel.virtual_pipeline=3"], 1, "parallel.pipeline of 2"),
        (["num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=4"], 2, "model.num_layers / pipeline=2"),
        (["num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "global_batch_size=3"], 2, "3 micro-b"),
        (["parallel.context=2", "data.sequence_length=30"], 2, "multiple of twice that"),
        (["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=31"], 2, "does not divide 31 tokens"),
        (["parallel.context=2"], 3, "3 processes"),
        (
            ["num_layers=4", "parallel.pipeline=2", "overlap_gradients=true"],
            4,
            "overlap_gradients .* parallel.pipeline=1",
        ),
        (["overlap_parameters=true"], 2, "overlap_parameters .* parallel.distributed_optimizer=true"),
        ([*DISTRIBUTED, "overlap_parameters=true", "overlap_gradients=false"], 2, "parallel.overlap_gradients=true"),
        (
            [*DISTRIBUTED, "num_layers=4", "parallel.pipeline=2", "overlap_parameters=true"],
            4,
            "overlap_parameters .* parallel.pipeline=1",
        ),
        ([*BF16, "parallel.tensor=2", "overlap_tensor=true"], 2, "overlap_tensor .* parallel.sequence=true"),
        ([*SEQUENCE, "overlap_tensor=true"], 2, "overlap_tensor .* precision.dtype=bf16 or fp8"),
        ([*SEQUENCE, *FP8, "fp8_recipe=blockwise", "overlap_tensor=true"], 2, "fp8_recipe=tensorwise or delayed"),
        (["cuda_graphs=true"], 1, "cuda_graphs .* precision.dtype=bf16 or fp8"),
        ([*BF16, "num_layers=4", "parallel.pipeline=2", "cuda_graphs=true"], 2, "cuda_graphs .* parallel.pipeline=1"),
        ([*BF16, "recompute=true", "cuda_graphs=true"], 1, "cuda_graphs .* training.recompute=true"),
        ([*BF16, "parallel.context=2", "cuda_graphs=true"], 2, "training.cuda_graphs .* parallel.context=2"),
        (
            [*BF16, *SEQUENCE, "parallel.context=2", "overlap_tensor=true"],
            4,
            "parallel.overlap_tensor .* parallel.context=2",
        ),
        ([*FP8, "data.sequence_length=4090"], 1, "4090, and must be a multiple of 16 .*4080 or 4096 would work"),
        ([*FP8, "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=16"], 2, "32 would work"),
        ([*FP8, "precision.fp8_recipe=blockwise", "ffn_hidden_size=320"], 1, "256 or 384 would work"),
        ([*FP8, "parallel.tensor=2", "precision.fp8_recipe=blockwise", "ffn_hidden_size=384"], 2, "256 or 512"),
    ],
)
def test_layouts_that_do_not_divide(overrides, world, message):
    with pytest.raises(SodaError, match=message):
        check_layout(load_recipe(None, overrides), world)
    assert check_layout(load_recipe(None, []), 4) == 4


@pytest.mark.parametrize(
    ("overrides", "unit"),
    [
        ([], 16),
        (["parallel.context=2"], 32),
        (["parallel.context=2", "parallel.tensor=2"], 32),
        (["parallel.context=2", *SEQUENCE], 64),
        ([*FP8, "precision.fp8_recipe=blockwise", "parallel.context=2"], 256),
    ],
)
def test_tokens_of_a_micro_batch_come_in_units(overrides, unit):
    assert token_unit(load_recipe(None, overrides)) == unit


CPU, LOCAL, TE = {"cuda": False, "engine": False}, {"cuda": True, "engine": False}, {"cuda": True, "engine": True}
NAMES = "overlap_gradients", "overlap_parameters", "overlap_tensor", "fuse_rope", "fuse_gradients", "cuda_graphs"


@pytest.mark.parametrize(
    ("overrides", "replicas", "machine", "on"),
    [
        ([], 2, TE, ["overlap_gradients", "fuse_rope", "fuse_gradients"]),
        (DISTRIBUTED, 2, TE, ["overlap_gradients", "overlap_parameters", "fuse_rope", "fuse_gradients"]),
        ([*DISTRIBUTED, "overlap_parameters=false"], 2, LOCAL, ["overlap_gradients"]),
        ([*DISTRIBUTED, "overlap_gradients=false"], 2, LOCAL, []),
        ([*DISTRIBUTED, "parallel.pipeline=2"], 2, LOCAL, []),
        ([*DISTRIBUTED, *BF16, "parallel.context=2"], 1, TE, ["fuse_rope", "fuse_gradients"]),
        (["fuse_rope=false", "fuse_gradients=false"], 1, TE, []),
        ([*BF16, *SEQUENCE, "overlap_tensor=true"], 1, TE, ["overlap_tensor", "fuse_rope", "fuse_gradients"]),
        ([*BF16, "cuda_graphs=true"], 1, TE, ["fuse_rope", "fuse_gradients", "cuda_graphs"]),
        (DISTRIBUTED, 2, CPU, ["fuse_rope"]),
        ([*DISTRIBUTED, "overlap_gradients=true"], 2, CPU, ["overlap_gradients", "fuse_rope"]),
        (["fuse_rope=true"], 1, CPU, ["fuse_rope"]),
        (["overlap_gradients=true", "fuse_rope=false"], 1, CPU, []),
        ([*DISTRIBUTED, "overlap_parameters=true"], 2, CPU, ["overlap_gradients", "overlap_parameters", "fuse_rope"]),
        ([*DISTRIBUTED, "overlap_parameters=true"], 1, CPU, ["fuse_rope"]),
    ],
)
def test_what_is_chosen_for_speed(overrides, replicas, machine, on):
    chosen = choose(load_recipe(None, overrides), replicas, **machine)
    assert [name for name in NAMES if getattr(chosen, name)] == on
    assert chosen.fuse_swiglu == ("triton" if machine["cuda"] and importlib.util.find_spec("triton") else "torch")
    assert not choose(load_recipe(None, [*overrides, "fuse_swiglu=false"]), replicas, **machine).fuse_swiglu
    assert choose(load_recipe(None, []), 1, **TE).fuse_rope == "transformer_engine"
    assert choose(load_recipe(None, []), 1, **CPU).fuse_rope == "torch"


def test_the_choice_is_said():
    assert choose(load_recipe(None, ["overlap_gradients=true", "fuse_swiglu=false"]), 2, **CPU).line() == (
        "overlap_gradients on, overlap_parameters off, overlap_tensor off, fuse_swiglu off, fuse_rope torch, "
        "fuse_gradients off, cuda_graphs off"
    )


def test_one_rank_asks_for_nothing():
    """A checkpoint is exported anywhere."""
    wanted = [*BF16, *SEQUENCE, *DISTRIBUTED, "overlap_parameters=true", "overlap_tensor=true", "cuda_graphs=true"]
    alone = load_recipe(None, [*wanted, "fuse_gradients=true", "fuse_rope=true"]).on_one_rank()
    assert not choose(alone, 1, **LOCAL).fuse_gradients


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        ([*BF16, *SEQUENCE, "overlap_tensor=true"], LOCAL, "parallel.overlap_tensor=true needs Transformer Engine"),
        ([*BF16, "cuda_graphs=true"], CPU, "training.cuda_graphs=true needs Transformer Engine"),
        (["fuse_gradients=true"], CPU, "training.fuse_gradients=true needs Transformer Engine"),
        (["fuse_rope=true"], LOCAL, "fuse_rope=true on CUDA .* Transformer Engine"),
        (["parallel.context=2"], TE, "parallel.context=2: between ranks, .* takes bf16 alone"),
    ],
)
def test_what_is_missing_for_speed(overrides, machine, message):
    with pytest.raises(SodaError, match=message):
        choose(load_recipe(None, overrides), 1, **machine)


def test_presets_fill_only_what_is_not_set():
    model = load_recipe(None, ["model.preset=135m", "model.num_layers=2"]).model
    assert isinstance(model, Model)
    assert (model.num_layers, model.hidden_size) == (2, PRESETS["135m"][1])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('prepare.speech=""', ""),
        ("prepare.speech=''", ""),
        ("prepare.speech=", ""),
        ("prepare.speech=/data/a #1", "/data/a #1"),
        ("prepare.speech=/data/a: b", "/data/a: b"),
        ("prepare.speech=[a]", "[a]"),
        ("prepare.speech={a: b}", "{a: b}"),
        ("prepare.speech=*.tar", "*.tar"),
        ("prepare.speech=&x", "&x"),
        ("prepare.speech=${HOME}/x", "${HOME}/x"),
        ("prepare.speech=${run}", "${run}"),
        ("prepare.speech=???", "???"),
        ("prepare.speech=a=b", "a=b"),
        ("prepare.speech=no", "no"),
        ("prepare.speech=2024-99-99", "2024-99-99"),
        ("prepare.speech=0x10", "0x10"),
        ("prepare.speech=1e3", "1e3"),
        ("prepare.speech=null", "null"),
        ("prepare.speech=~", "~"),
        ("prepare.speech='/data/it\"s'", '/data/it"s'),
        ('prepare.speech="/data/a \\"b\\" \\\\c"', '/data/a "b" \\c'),
        ("prepare.speech='a' and 'b'", "'a' and 'b'"),
        ('prepare.speech="', '"'),
        ("speech=/data/a #1", "/data/a #1"),
    ],
)
def test_a_string_is_what_stands_there(override, value, tmp_path):
    recipe = load_recipe(None, [override, "prepare.text=[x]"])
    assert recipe.prepare.speech == value
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[]", []),
        ("[ ]", []),
        ("[no]", ["no"]),
        ("[no, yes,on , 1e3,null,~, 3,]", ["no", "yes", "on", "1e3", "null", "~", "3"]),
        ("['no', \"a, b\"]", ["no", "a, b"]),
        ("['it''s', \"\\u00e9\"]", ["it's", "é"]),
        ("[it's, 5\"]", ["it's", '5"']),
        ("[/data/[a]/x, b]", ["/data/[a]/x", "b"]),
        ("[/data/[a,b]/*.txt,[c].txt]", ["/data/[a,b]/*.txt", "[c].txt"]),
        ("[/data/a]b/x, c[d]", ["/data/a]b/x", "c[d"]),
        ("[*.txt, ?.txt, &a, !b, %c, @d, a: b, {e}, a #1]", "*.txt ?.txt &a !b %c @d a:_b {e} a_#1".split()),
        ("[${HOME}/x,${run}]", ["${HOME}/x", "${run}"]),
    ],
)
def test_a_list_of_strings_holds_strings(written, value, tmp_path):
    recipe = load_recipe(None, [f"prepare.text={written}"])
    assert recipe.prepare.text == [one.replace("_", " ") for one in value]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("written", ["", "a", "a,b", "[a", "{a: b}", "[", "[a,,b]", '["\\d"]'])
def test_what_is_no_list_is_named(written):
    with pytest.raises(SodaError, match=r"prepare\.text=.*(write a list as|an empty element|not YAML)"):
        load_recipe(None, [f"prepare.text={written}"])


def test_a_recipe_is_read_by_the_types_of_its_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "run: 2024-01-02\nname: null\n"
        "prepare: {languages: [no, on, 1e3, null], speech: '${X} #1', text: ['/data/[a]/x', '*'], downloads: 1.10}\n"
        "data:\n  corpora: &same {no: 010, b: '${b}'}\n  mix: [{shares: {no: 1, b: 1e-1}}]\n"
        "training: {learning_rate: 1e-4, steps: 16, loss_weights: {no: 2}, async_save: on}\n"
        "model: {tie_embeddings: null}\nparallel: {sequence: no}\n"
    )
    r = load_recipe(path, ["data.corpora.c.d=/x #1", "data.corpora={e: no}", "training.loss_weights.text=3"])
    assert (r.run, r.name, r.prepare.downloads, r.prepare.speech) == ("2024-01-02", "null", "1.10", "${X} #1")
    assert r.prepare.languages == ["no", "on", "1e3", "null"]
    assert r.prepare.text == ["/data/[a]/x", "*"]
    assert r.data.corpora == {"no": "010", "b": "${b}", "c.d": "/x #1", "e": "no"}
    assert r.data.mix == [MixStage(0, {"no": 1.0, "b": 0.1})]
    assert (r.optimizer.learning_rate, r.training.steps, r.checkpoint.async_save) == (1e-4, 16, True)
    assert r.training.loss_weights == {"no": 2.0, "text": 3.0}
    assert (r.model.tie_embeddings, r.parallel.sequence) == (False, False)
    save_recipe(r, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == r


def test_keys_that_a_merge_overrides_are_not_twice_there(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("b: &b {x: 1}\na: {inner: &m {<<: *b, x: 2}}\nc: {<<: *m, y: 3}\n1: d\n'1': e\n")
    assert read_yaml(path) == {"b": {"x": 1}, "a": {"inner": {"x": 2}}, "c": {"x": 2, "y": 3}, 1: "d", "1": "e"}


def test_what_a_merge_takes_is_by_the_rule_of_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- &a {rate: 1}\n- &b {rate: 2, width: 5}\n- {<<: [*a, *b]}\n- {<<: [*b, *a], width: 6}\n")
    assert read_yaml(path)[2:] == [{"rate": 1, "width": 5}, {"rate": 2, "width": 6}]
    path.write_text("&a {<<: *a, rate: 1}")
    assert read_yaml(path) == {"rate": 1}
    path.write_text("a: &a 3\nb: {<<: *a}")
    with pytest.raises(SodaError, match="line 1: << needs a mapping"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {steps: 7, steps: 8}", "line 1: steps is duplicated"),
        ("training:\n  steps: 7\n  z_loss: 0\n  steps: 8", "line 4: steps is duplicated"),
        ("training: {steps: 1.5}", r"training\.steps: must be a whole number, not '1.5'"),
        ("training: {steps: true}", r"training\.steps: must be a whole number"),
        ("training: {steps: }", r"training\.steps: must be a whole number, not ''"),
        ("optimizer: {beta1: [1]}", r"optimizer\.beta1: must be a number"),
        ("checkpoint: {async_save: often}", r"checkpoint\.async_save: must be true or false, not 'often'"),
        ("prepare: {text: a}", r"prepare\.text: must be a list"),
        ("prepare: {text: [[a]]}", r"prepare\.text\[0\]: must be text"),
        ("prepare: {speech: {a: b}}", r"prepare\.speech: must be text"),
        ("data: {corpora: [a]}", r"data\.corpora: must be a mapping"),
        ("data: {mix: [{shares: {a: b}}]}", r"data\.mix\[0\]\.shares\.a: must be a number, not 'b'"),
        ("training: 3", "training is a section"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SodaError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_value_that_may_be_none(tmp_path):
    (tmp_path / "r.yaml").write_text("prepare: {columns: {id: null, text: no, speaker: a}}\n")
    r = load_recipe(tmp_path / "r.yaml", ["prepare.columns.speaker=a #1", "prepare.columns={language: ~}"])
    assert r.prepare.columns == {"id": None, "text": "no", "speaker": "a #1", "language": None}
    assert load_recipe(None, ["prepare.columns.id=null", "tie_embeddings=no"]).prepare.columns == {"id": None}
    save_recipe(r, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == r


def test_yaml_merges(tmp_path):
    (tmp_path / "r.yaml").write_text("model: &m {norm_epsilon: 1e-3}\ntraining: {<<: {steps: 3}, log_every: 2}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.training.steps, recipe.logging.log_every) == (3, 2)


def test_keys_of_earlier_versions_still_load(tmp_path, capsys):
    """Every key that has another name now; and what was written with the old names means the same."""
    old, new = {}, {}
    samples = {"int": 3, "bool": True, "float": 0.25, "str": "x"}
    for before, after in RENAMED.items():
        (_, name), (section, key) = before.split("."), after.split(".")
        default = getattr(getattr(load_recipe(None), section), key)
        known = {"name": {"optimizer": "cautious", "schedule": "cosine"}, "dtype": "bf16", "cautious_mask": "layer"}
        value = known.get(key, samples[type(default).__name__])
        value = {"fp8_recipe": "blockwise", "bf16_layers": 0}.get(key, value)
        value = value[section] if isinstance(value, dict) else value
        old[name] = value
        new.setdefault(section, {})[key] = value
    (tmp_path / "old.yaml").write_text(json.dumps({"training": {**old, "steps": 7}}))
    (tmp_path / "new.yaml").write_text(json.dumps({"training": {"steps": 7}, **new}))
    assert load_recipe(tmp_path / "old.yaml") == load_recipe(tmp_path / "new.yaml")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for before, after in RENAMED.items():
        assert f"{before} is now {after}" in said
    assert load_recipe(None, ["precision=bf16", "training.schedule=cosine"]).schedule.name == "cosine"
    assert load_recipe(None, ["learning_rate=1e-4"]).optimizer.learning_rate == 1e-4
    (tmp_path / "both.yaml").write_text("training: {beta1: 0.5}\noptimizer: {beta1: 0.6}\n")
    with pytest.raises(SodaError, match=r"training\.beta1 is now optimizer\.beta1, and both are given"):
        load_recipe(tmp_path / "both.yaml")


def test_a_recipe_that_builds_on_another(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text(
        "{name: a, training: {steps: 7, global_batch_size: 4}, prepare: {text: [x, y]}}"
    )
    (tmp_path / "below/mid.yaml").write_text("base: ../base.yaml\nname: b\ntraining: {steps: 8}\n")
    (tmp_path / "top.yaml").write_text("base: below/mid.yaml\nprepare: {text: [z]}\n")
    recipe = load_recipe(tmp_path / "top.yaml", ["training.micro_batch_size=2"])
    assert (recipe.name, recipe.prepare.text) == ("b", ["z"])
    assert (recipe.training.steps, recipe.training.global_batch_size, recipe.training.micro_batch_size) == (8, 4, 2)
    save_recipe(recipe, tmp_path / "whole.yaml")
    assert "base" not in (tmp_path / "whole.yaml").read_text()
    assert load_recipe(tmp_path / "whole.yaml") == recipe
    for text, message in [
        ("base: none.yaml", "none.yaml: cannot read the recipe"),
        ("base: [a]", "base: must be the path of a recipe"),
        ("base: top.yaml", "builds on this recipe itself"),
        ("base: base.yaml\ntraining: {stepz: 1}", r"top\.yaml: unknown key training\.stepz"),
        ("base: base.yaml\ntraining: {steps: -1}", r"top\.yaml: training\.steps=-1"),
    ]:
        (tmp_path / "top.yaml").write_text(text)
        with pytest.raises(SodaError, match=message):
            load_recipe(tmp_path / "top.yaml")
    (tmp_path / "base.yaml").write_text("training: {steps: -2}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nname: c")
    with pytest.raises(SodaError, match=r"base\.yaml: training\.steps=-2"):
        load_recipe(tmp_path / "top.yaml")


def test_all_problems_are_told_at_once():
    with pytest.raises(SodaError) as caught:
        load_recipe(None, ["training.steps=0", "parallel.tensor=many"])
    assert len(str(caught.value).splitlines()) == 2


def test_the_schema_is_the_one_of_the_recipe():
    """docs/recipe.schema.json, which editors use. To write it anew: python tools/recipe_schema.py"""
    committed = json.loads((Path(__file__).resolve().parents[1] / "docs/recipe.schema.json").read_text())
    assert committed == recipe_schema()
    assert committed["additionalProperties"] is False
    assert committed["$defs"]["Precision"]["properties"]["dtype"]["enum"] == ["fp32", "bf16", "fp8"]
    assert all("description" in p for p in committed["$defs"]["Prepare"]["properties"].values())
