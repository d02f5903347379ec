"""The real Transformer Engine, without a GPU: it makes its modules on the CPU, and these are what ours expects.

Nothing is computed with them. But names, shapes and marks of parameters, what checkpoints and exports make of them, the
arguments that megatron-core passes, FP8 recipes and the optimizer's state are looked at for every layout; and the fake
that computes in its place (tests/fakes/transformer_engine_fake.py) must say the same. Skipped where the package is not;
CONTRIBUTING.md says how to install it.
"""

import importlib.util
import inspect
import json
import multiprocessing as mp
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_soda.parallel.one_node import stay_on_loopback
from tests.distributed import test_te_spec as spec
from tests.helpers import SPACE, small_recipe, write_data

SPLIT = ["parallel.context=2", "precision.dtype=bf16"]  # its attention between ranks takes bf16 alone
LAYOUTS = {
    "one": (1, []),
    "tied": (1, ["model.tie_embeddings=true"]),
    "bf16": (1, ["precision.dtype=bf16"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "sp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "cp2": (2, SPLIT),
    "pp2": (2, ["parallel.pipeline=2"]),
    "vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "sp2pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "vpp2sp2": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2", "parallel.sequence=true"],
    ),
    "sp2cp2": (4, ["parallel.tensor=2", "parallel.sequence=true", *SPLIT]),
}
FP8 = {
    "delayed": ["precision.fp8_recipe=delayed"],
    "tensorwise": ["precision.fp8_recipe=tensorwise"],
    "blockwise": ["precision.fp8_recipe=blockwise"],
    "tensorwise_ends": ["precision.fp8_recipe=tensorwise", "precision.bf16_layers=1"],
    "blockwise_ends": ["precision.fp8_recipe=blockwise", "precision.bf16_layers=1"],
}
CALLED = {  # what megatron-core makes, and what it calls then
    "transformer_engine.pytorch": ["Linear", "LayerNormLinear", "DotProductAttention"],
    "transformer_engine.pytorch.optimizers": ["FusedAdam"],
}


# --- in a process with the real package, or with the fake


def chunks(backend: str, *overrides: str) -> list[Any]:
    """This rank's parts of the model."""
    import torch

    from megatron_soda.model import gpt

    recipe = spec.recipe_of(backend, *overrides)
    turns = recipe.parallel.virtual_pipeline
    return [
        gpt.build_model(recipe, SPACE, torch.device("cpu"), chunk) for chunk in (range(turns) if turns > 1 else [None])
    ]


MARKS = "tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce"
SETTINGS = "tp_size", "sequence_parallel", "parallel_mode", "use_bias", "return_bias", "in_features", "out_features"
SETTINGS += "eps", "normalization", "zero_centered_gamma", "attn_mask_type", "qkv_format", "softmax_scale"
SETTINGS += "cp_global_ranks", "cp_comm_type"


def modules_of(part: Any) -> list[Any]:
    """By module of Transformer Engine: its class, and what it was told."""
    from transformer_engine.pytorch import DotProductAttention, LayerNormLinear, Linear, RMSNorm

    return [
        [name, type(m).__name__, {k: str(getattr(m, k)) for k in SETTINGS if hasattr(m, k)}]
        for name, m in part.named_modules()
        if isinstance(m, DotProductAttention | LayerNormLinear | Linear | RMSNorm)
    ]


def parameters_of(part: Any) -> list[Any]:
    from megatron_soda.model.gpt import global_name

    return sorted(
        [spec.te_name(global_name(part, k)), list(p.shape), str(p.dtype), {m: getattr(p, m, None) for m in MARKS}]
        for k, p in part.named_parameters()
    )


def stored(parts: list[Any]) -> list[Any]:
    """What a checkpoint has of every tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_soda.training.checkpoint import sharded_state

    state = sharded_state(parts, None, loading=False)
    apply_factories(state)
    found = list(nested_values(state))
    assert all(isinstance(value, ShardedTensor) for value in found)
    return sorted([p.key, str(p.dtype), list(p.global_shape), list(p.global_offset), str(p.replica_id)] for p in found)


def layout(*overrides: str) -> dict[str, Any]:
    local, te = (chunks(backend, *overrides) for backend in ("local", "transformer_engine"))
    values = [{spec.te_name(k): v for part in parts for k, v in spec.weights(part).items()} for parts in (local, te)]
    return {
        "parameters": [[parameters_of(part) for part in parts] for parts in (local, te)],
        "stored": [stored(parts) for parts in (local, te)],
        "other_values": [k for k, v in values[0].items() if not v.equal(values[1][k])],
        "state_dict": [list(part.state_dict()) for part in te],
        "modules": [modules_of(part) for part in te],
    }


def split_documents() -> dict[str, Any]:
    """Of a batch that is split between ranks: the tokens, as we split them and as Transformer Engine's own function
    does; rotary positions of both; and what its attention calls the function with that exchanges keys and values, which
    computes on a GPU alone."""
    import torch
    from megatron.core import parallel_state
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    from megatron_soda.model import gpt

    model, batch = spec.build("transformer_engine", *SPLIT), spec.batch_of(spec.SPLIT)
    given: dict[str, Any] = {}
    with mock.patch.object(gpt.SodaModel, "forward", lambda *_, **more: given.update(more)):
        inputs = gpt.inputs_of(model, batch)
        gpt.forward(model, inputs)
    group, packed, tokens = parallel_state.get_context_parallel_group(), given["packed_seq_params"], inputs.batch.tokens

    flat = batch.tokens.flatten(), batch.labels.flatten()
    *padded, starts = context_parallel.pad_thd_sequences_for_cp(*flat, batch.cu_seqlens, 2 * group.size(), 0, 0)
    counted = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(starts.diff())
    theirs = context_parallel.get_batch_on_this_cp_rank(starts, *(x[None] for x in padded), counted[None], group)

    places = torch.ones(tokens.numel(), 1, 16, dtype=torch.float64)
    angles = torch.arange(packed.max_seqlen_q)[:, None, None, None] * torch.full((1, 1, 1, 16), 1e-3).double()
    split = {"cu_seqlens": packed.cu_seqlens_q, "cp_size": 2, "cp_rank": group.rank()}
    turned = apply_rotary_pos_emb(places, angles, tensor_format="thd", fused=False, **split)
    position = torch.atan2(turned[:, 0, 8] - turned[:, 0, 0], turned[:, 0, 8] + turned[:, 0, 0]) / 1e-3

    call: dict[str, Any] = {}

    def exchange(*arguments: Any) -> Any:
        names = list(inspect.signature(context_parallel.AttnFuncWithCPAndKVP2P.forward).parameters)[1:]
        call.update(zip(names, arguments, strict=True))
        return call["q"].flatten(1)

    shapes = (4, 16), (2, 16), (2, 16)
    layers = (torch.randn(tokens.numel(), *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    fused = int(backends.FusedAttnBackend["F16_arbitrary_seqlen"])
    attention = model.decoder.layers[0].self_attention
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(utils, "_get_fused_attn_backend", return_value=(fused, "")),
        mock.patch.object(context_parallel.AttnFuncWithCPAndKVP2P, "apply", exchange),
    ):
        attention.core_attention(*layers, None, attn_mask_type=attention.attn_mask_type, packed_seq_params=packed)
    return {
        "tokens": [tokens.flatten().tolist(), theirs[0].flatten().tolist()],
        "labels": [inputs.batch.labels.flatten().tolist(), theirs[1].flatten().tolist()],
        "positions": [position.round(decimals=3).tolist(), theirs[2].flatten().tolist()],
        "starts": [call["cu_seqlens_q"].tolist(), starts.tolist()],
        "padded": call["cu_seqlens_q_padded"] is call["cu_seqlens_q"],
        "call": {name: call[name] for name in CALL},
        "ranks": [call["cp_global_ranks"], call["cp_group"].size()],
    }


CALL = "max_seqlen_q", "qkv_format", "attn_mask_type", "pad_between_seqs", "use_fused_attention", "fp8", "dropout_p"


def exported() -> dict[str, Any]:
    from tests.qwen3 import as_qwen3

    model = spec.recipe_of("local").model
    parts = [as_qwen3(chunks(b)[0].state_dict(), model, SPACE) for b in ("local", "transformer_engine")]
    return {"names": [list(p) for p in parts], "other": [k for k, v in parts[0].items() if not v.equal(parts[1][k])]}


def fp8(*overrides: str) -> list[Any]:
    """By layer of the whole model: the FP8 recipe inside its context, or None."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    (part,) = chunks("transformer_engine", "precision.dtype=fp8", *overrides)
    found = []
    for layer in part.decoder.layers:
        with get_fp8_context(part.config, layer.layer_number - 1):
            recipe = FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None
            names = "fp8_format", "margin", "amax_history_len", "amax_compute_algo", "reduce_amax", "fp8_dpa", "fp8_mha"
            found.append(
                recipe and [type(recipe).__name__, {k: str(getattr(recipe, k)) for k in names if hasattr(recipe, k)}]
            )
    return found


def signatures() -> dict[str, list[Any]]:
    """Names and defaults of arguments."""
    found = {}
    for module, names in CALLED.items():
        for name in names:
            of_class = getattr(sys.modules[module], name)
            for function in ("__init__", "step" if name == "FusedAdam" else "forward"):
                parameters = inspect.signature(getattr(of_class, function)).parameters.values()
                found[f"{name}.{function}"] = [
                    [p.name, str(p.kind), repr(p.default)] for p in parameters if p.name != "self"
                ]
    return found


def training(folder: Path, *overrides: str) -> dict[str, Any]:
    """Losses and gradient norms of six steps of local layers under FusedAdam: straight; stopped halfway; and, if that
    is allowed, with torch's AdamW for the second half. And what is in its state."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    from megatron_soda.training import checkpoint, optimizer, trainer

    data, states = write_data(folder / "data"), []
    torchs = optimizer.choose_adam
    finish = optimizer.Optimizer.step

    def step(self: Any, rate: float) -> float:
        norm = finish(self, rate)
        inner = [part.optimizer for part in optimizer._parts(self.inner)]
        if isinstance(inner[0], FusedAdam):
            kinds = {(k, str(v.dtype)) for one in inner for state in one.state.values() for k, v in state.items()}
            states[:] = [sorted(kinds), sorted({group["step"] for one in inner for group in one.param_groups})]
        return norm

    optimizer.Optimizer.step = step

    def train(name: str, *adams: tuple[int, Callable[..., Any]]) -> list[list[float]]:
        for count, choose in adams:
            optimizer.choose_adam = checkpoint.choose_adam = choose
            flat = ["schedule.warmup_share=0", "schedule.decay_share=0"]
            wanted = ["training.backend=local", f"training.steps={count}", "checkpoint.save_every=3", *flat, *overrides]
            trainer.train(small_recipe(folder / name, data, *wanted))
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]

    def fused(_: bool) -> Any:
        return "FusedAdam", FusedAdam, False

    try:
        found = {"torch": train("torch", (6, torchs)), "straight": train("straight", (6, fused)), "state": states}
        found["halves"] = train("halves", (3, fused), (6, fused))
        if "parallel.distributed_optimizer=true" in overrides:
            found["to_torch"] = train("to_torch", (3, fused), (6, torchs))
            found["from_torch"] = train("from_torch", (3, torchs), (6, fused))
        return found
    finally:
        optimizer.choose_adam = checkpoint.choose_adam = torchs
        optimizer.Optimizer.step = finish


OPTIMIZERS = {
    "bf16": ["precision.dtype=bf16"],
    "distributed": ["parallel.distributed_optimizer=true"],
}


def adam(_chunk: int, _noop: Any, tensors: Any, rate: float, beta1: float, beta2: float, epsilon: float, step: int,
         mode: int, correct: int, decay: float) -> None:  # fmt: skip
    """In the place of Transformer Engine's kernel: AdamW on lists of gradients, parameters and both moments."""
    assert mode == 1
    assert isinstance(step, int)
    first, second = (1 - beta1**step, 1 - beta2**step) if correct else (1, 1)
    for gradient, parameter, mean, square in zip(*tensors, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        change = mean / first / ((square / second).sqrt() + epsilon) + decay * parameter
        parameter.sub_(rate * change)


def install(kind: str) -> None:
    """Makes Transformer Engine importable, before megatron: the real one with three kernels in torch, or the fake."""
    from tests.fakes import cuda_fake, transformer_engine_fake

    if kind == "fake":
        transformer_engine_fake.install()
        return
    import transformer_engine.pytorch.optimizers as optimizers
    import transformer_engine_torch

    cuda_fake.on_the_cpu()
    optimizers.multi_tensor_l2norm = transformer_engine_fake.multi_tensor_l2norm
    optimizers.multi_tensor_scale = transformer_engine_fake.multi_tensor_scale
    optimizers.multi_tensor_scale_tensor = transformer_engine_fake.multi_tensor_scale_tensor
    transformer_engine_torch.multi_tensor_adam = adam


def on_a_rank(rank: int, world: int, store: str, name: str) -> dict[str, Any]:
    import torch.distributed as dist

    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    stay_on_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(f"{store}_{name}", world), rank=rank, world_size=world)
    if name == "split":
        return checked({name: split_documents}, *SPLIT)[name]
    overrides = LAYOUTS[name][1]
    return checked({name: lambda: layout(*overrides)}, *overrides)[name]


def checked(checks: dict[str, Callable[[], Any]], *overrides: str) -> dict[str, Any]:
    from tests.fakes.cuda_fake import pretended

    def with_device(check: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with pretended():
                return check()

        return call

    return spec.run({k: v if k.startswith("training/") else with_device(v) for k, v in checks.items()}, *overrides)


def main(folder: Path, kind: str) -> None:
    install(kind)
    from megatron_soda.parallel import ranks, speed  # noqa: F401  ranks must be there before megatron

    from megatron.core.extensions.transformer_engine import TEDotProductAttention  # isort: skip

    TEDotProductAttention.cp_stream = "a stream"  # or it would make one, of CUDA
    speed.choose_backend = lambda wanted: wanted
    import megatron_soda.training.trainer  # noqa: F401

    results: dict[str, Any] = {}
    worlds = {name: world for name, (world, _) in LAYOUTS.items()} | ({"split": 2} if kind == "real" else {})
    for name, world in worlds.items():
        with mp.get_context("fork").Pool(world) as pool:
            arguments = [(rank, world, str(folder / "store"), name) for rank in range(world)]
            results[name] = pool.starmap(on_a_rank, arguments, chunksize=1)
    checks: dict[str, Callable[[], Any]] = {"signatures": signatures, "exported": exported}
    checks |= {f"fp8/{name}": lambda o=o: fp8(*o) for name, o in FP8.items()}
    if kind == "real":  # of the fake's optimizer test_te_spec.py has more
        checks |= {f"training/{name}": lambda n=name, o=o: training(folder / n, *o) for name, o in OPTIMIZERS.items()}
    results |= checked(checks)
    (folder / "results.json").write_text(json.dumps(results))


# --- the tests

installed = importlib.util.find_spec("transformer_engine") is not None
pytestmark = pytest.mark.skipif(not installed, reason="needs the package transformer-engine, but no GPU")


def child(folder: Path, kind: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.test_te_real", str(folder), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=spec.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Any]:
    return child(tmp_path_factory.mktemp("real"), "real")


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> dict[str, Any]:
    return child(tmp_path_factory.mktemp("fake"), "fake")


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_those_of_the_local_layers(real, name):
    """Names, shapes and dtypes; the marks by which gradients are summed and norms counted, where they matter."""
    for rank in spec.of(real, name):
        local, te = rank["parameters"]
        assert [[p[:3] for p in part] for part in te] == [[p[:3] for p in part] for part in local]
        for of_local, of_te in zip(chain(*local), chain(*te), strict=True):
            for mark in ("tensor_model_parallel", "sequence_parallel"):
                assert bool(of_te[3][mark]) == bool(of_local[3][mark]), of_te[0]
            if of_te[3]["tensor_model_parallel"]:
                assert of_te[3]["partition_dim"] == of_local[3]["partition_dim"], of_te[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_have_the_same_tensors(real, name):
    for rank in spec.of(real, name):
        local, te = rank["stored"]
        assert len(te) > 10
        assert te == local


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_start_from_the_same_weights(real, name):
    assert [rank["other_values"] for rank in spec.of(real, name)] == [[]] * LAYOUTS[name][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_modules_are_told_the_layout(real, name):
    tensor = 2 if name in ("tp2", "sp2", "sp2pp2", "vpp2sp2", "sp2cp2") else 1
    for rank in spec.of(real, name):
        modules = list(chain(*rank["modules"]))
        linear = [settings for _, kind, settings in modules if "Linear" in kind]
        assert len(linear) == 4 * (2 if "pp2" in name else 4)
        for settings in linear:
            assert settings["tp_size"] == str(tensor)
            assert settings["sequence_parallel"] == str("sp2" in name)
        attention = [settings for _, kind, settings in modules if kind == "TEDotProductAttention"]
        assert len(attention) == len(linear) // 4
        for settings in attention:
            ranks = json.loads(settings["cp_global_ranks"].replace("None", "[0]"))
            assert len(ranks) == (2 if "cp2" in name else 1)


def test_documents_are_split_as_transformer_engine_does(real):
    """Ours ends with what fills the batch up."""
    for rank in spec.of(real, "split"):
        for what in ("tokens", "labels", "positions", "starts"):
            ours, theirs = rank[what]
            assert len(theirs) > 5
            assert ours[: len(theirs)] == theirs, what


def test_its_attention_is_told_of_the_split(real):
    for rank in spec.of(real, "split"):
        assert rank["padded"]
        assert rank["ranks"] == [[0, 1], 2]
        assert rank["call"] == {
            "max_seqlen_q": 32,
            "qkv_format": "thd",
            "attn_mask_type": "padding_causal",
            "pad_between_seqs": False,
            "use_fused_attention": True,
            "fp8": False,
            "dropout_p": 0.0,
        }


def test_the_export_has_the_same_weights(real):
    found = real["exported"]
    assert found["other"] == []
    assert found["names"][1] == found["names"][0]
    assert len(found["names"][0]) == 3 + 4 * 11


CLASSES = {"delayed": "TEDelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


@pytest.mark.parametrize("name", FP8)
def test_fp8_recipes(real, name):
    kind, _, ends = name.partition("_")
    found = spec.of(real, f"fp8/{name}")
    assert len(found) == 4
    assert [layer is None for layer in found] == [bool(ends), False, False, bool(ends)]
    for of_class, settings in found[1:3]:
        assert of_class == CLASSES[kind]
        assert settings["fp8_format"].endswith("HYBRID")
        if kind == "delayed":
            assert settings["amax_history_len"] == "1024"
            assert settings["amax_compute_algo"] == "max"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_adam_in_checkpoints(real, name):
    """It resumes bit by bit; torch's AdamW goes on from its checkpoint, and it from torch's."""
    (found,) = spec.of({name: [real[f"training/{name}"]]}, name)
    kinds, steps = found["state"]
    assert kinds == [["exp_avg", "torch.float32"], ["exp_avg_sq", "torch.float32"]]
    assert steps == [6]
    assert len(found["torch"]) == 6
    assert found["halves"] == found["straight"]
    tolerance = 1e-3 if name == "bf16" else 1e-5
    for other in ("straight", *(("to_torch", "from_torch") if name == "distributed" else ())):
        for expected, row in zip(found["torch"], found[other], strict=True):
            assert row == pytest.approx(expected, abs=tolerance), other


@pytest.mark.parametrize("name", [*LAYOUTS, "signatures", "exported", *(f"fp8/{name}" for name in FP8)])
def test_the_fake_says_the_same(real, fake, name):
    for one in (real, fake):
        spec.of({name: one[name] if isinstance(one[name], list) else [one[name]]}, name)
    assert fake[name] == real[name]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
