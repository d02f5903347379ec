"""Layers of Transformer Engine compute what the local ones do, under names that checkpoints and exports expect.

Without a GPU: against tests/fakes/transformer_engine_fake.py, in a process of its own, since megatron-core looks for
Transformer Engine when it is imported. That process does all the work; the tests below look at what it found.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_soda.parallel.one_node import stay_on_loopback
from tests.helpers import SPACE, small_recipe, write_data

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "one": [],
    "tp2": ["parallel.tensor=2"],
    "tp2_sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "cp2": ["parallel.context=2"],
}
BF16, SEQUENCE = "precision.dtype=bf16", ["parallel.tensor=2", "parallel.sequence=true"]
GATHER = ["parallel.distributed_optimizer=true", "parallel.overlap_parameters=true"]
FOR_SPEED = {  # (ranks, settings, settings that make it slower)
    "fused": (1, [], ["training.fuse_swiglu=false", "training.fuse_rope=false", "training.fuse_gradients=false"]),
    "graphs": (1, [BF16, "training.cuda_graphs=true"], ["training.cuda_graphs=false"]),
    "graphs and gathers": (2, [BF16, "training.cuda_graphs=true", *GATHER], ["training.cuda_graphs=false"]),
    "userbuffers": (2, [BF16, *SEQUENCE, "parallel.overlap_tensor=true"], ["parallel.overlap_tensor=false"]),
}
LIMIT = 1200  # seconds, ten times what it takes
LAYERS = 3 * 2 * 4  # that are computed: steps, micro-batches, layers
USED = {  # and validation, after the second and the third step, replays nothing
    "fused": ("fused gradients", LAYERS * 4),
    "graphs": ("graphs", LAYERS),
    "graphs and gathers": ("graphs", LAYERS // 2),
    "userbuffers": ("buffers", (LAYERS + 2 * 4) * 4),
}
FLAT = ["schedule.warmup_share=0", "schedule.decay_share=0"]  # or the schedule would tell where it ends
SMALL = "training.micro_batch_size=2"  # several micro-batches a step, which are padded to one size
MORE = {  # of split documents
    "cp2_recompute": (2, ["parallel.context=2", "training.recompute=true"]),
    "cp4": (4, ["parallel.context=4"]),
    "cp2pp2": (4, ["parallel.context=2", "parallel.pipeline=2", SMALL]),
    "cp2vpp2": (4, ["parallel.context=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2", SMALL]),
    "cp2sp2": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2dp2": (4, ["parallel.context=2", "parallel.distributed_optimizer=true", SMALL]),
}
NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


# --- in the process with the fake


def te_name(name: str) -> str:
    """Where Transformer Engine keeps the local layers' parameter of this name."""
    for local, te in NORMS.items():
        name = name.replace(local, te)
    return name


def recipe_of(backend: str, *overrides: str) -> Any:
    return small_recipe(Path("run"), Path("data"), f"training.backend={backend}", *overrides)


def build(backend: str, *overrides: str) -> Any:
    import torch

    from megatron_soda.model import gpt

    return gpt.build_model(recipe_of(backend, *overrides), SPACE, torch.device("cpu"))


def logits_of(model: Any, batch: Any) -> Any:
    from megatron_soda.model import gpt

    return gpt.forward(model, gpt.inputs_of(model, batch), logits=True)


def batch_of(lengths: tuple[tuple[int, ...], ...] = ((10, 9, 13), (32,))) -> Any:
    """A sequence for each tuple, of documents of these lengths."""
    from megatron_soda.data.batch import Batcher
    from megatron_soda.data.windows import Window

    rng = np.random.default_rng(0)
    windows = rng.integers(3, SPACE.size, (len(lengths), sum(lengths[0]) + 1)).astype(np.int32)
    for window, documents in zip(windows, lengths, strict=True):
        window[np.cumsum(documents) - 1] = SPACE.eos
    return Batcher(SPACE)([Window(ids, len(ids) - 1) for ids in windows])


def weights(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if v is not None and not k.endswith("_extra_state")}


def both(*overrides: str) -> tuple[Any, Any]:
    """The local and the Transformer Engine model, with the same weights, none of them at its initial value."""
    import torch

    local, te = build("local", *overrides), build("transformer_engine", *overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(local.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    te.load_state_dict({te_name(k): v for k, v in weights(local).items()}, strict=False)
    return local, te


def names_and_shapes() -> dict[str, Any]:
    from tests.fakes.transformer_engine_fake import TransformerEngineBaseModule

    models = [build(backend) for backend in ("local", "transformer_engine")]
    local, te = map(weights, models)
    return {
        "foreign": [name for name, m in models[0].named_modules() if isinstance(m, TransformerEngineBaseModule)],
        "local": {te_name(k): list(v.shape) for k, v in local.items()},
        "transformer_engine": {k: list(v.shape) for k, v in te.items()},
        "other_values": [k for k, v in local.items() if not v.equal(te[te_name(k)])],
    }


def checkpoint_keys(*overrides: str) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found = {}
    for backend in ("local", "transformer_engine"):
        state = build(backend, *overrides).sharded_state_dict()
        apply_factories(state)
        parts = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
        found[backend] = sorted([p.key, list(p.global_shape), list(p.global_offset)] for p in parts)
    return found


def differences(*overrides: str) -> dict[str, Any]:
    """Largest difference of a logit, and of every gradient as a share of its largest value."""
    import torch
    import torch.distributed as dist

    batch, found, gradients = batch_of(), [], []
    for model in both(*overrides):
        logits = logits_of(model, batch)
        found.append(logits)
        generator = torch.Generator().manual_seed(2)
        (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False):  # each rank saw a part of the tokens
                dist.all_reduce(parameter.grad)
        gradients.append({te_name(name): parameter.grad for name, parameter in model.named_parameters()})
    local, te = gradients
    return {
        "logits": float((found[0] - found[1]).abs().max()),
        "size": float(found[0].abs().max()),
        "gradients": {k: float((te[k] - v).abs().max() / v.abs().max()) for k, v in local.items()},
    }


LEGAL = "training.head_rows=legal", "training.steps=2"
SPLIT = (10, 1, 2, 19), (32,)  # one multiple of four, and documents of fewer tokens than chunks


def of_all_ranks(model: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Logits of this rank, without padding; which tokens of the batch they are of; and the logits of all its tokens."""
    import torch
    import torch.distributed as dist

    from megatron_soda.model import gpt

    count = batch.tokens.numel()
    numbered = dataclasses.replace(batch, loss_weight=torch.arange(1.0, count + 1).view_as(batch.loss_weight))
    inputs = gpt.inputs_of(model, numbered)  # it cuts these as it cuts the tokens
    number = inputs.batch.loss_weight.flatten().long() - 1
    logits = gpt.forward(model, inputs, logits=True).flatten(0, 1)[number >= 0]
    number = number[number >= 0]
    whole, held = torch.zeros(count, logits.shape[1], dtype=logits.dtype), torch.zeros(count)
    whole[number], held[number] = logits.detach(), 1
    if model.config.context_parallel_size > 1:
        dist.all_reduce(whole)
        dist.all_reduce(held)
    assert held.eq(1).all()  # every token is on one rank
    return logits, number, whole


def split_documents(dtype: str) -> dict[str, Any]:
    """Transformer Engine's layers on two context-parallel ranks, and MaskedAttention on one: largest differences of a
    logit, and of every gradient as a share of its largest value."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    torch.manual_seed(0)
    batch, found, gradients, dtype = batch_of(SPLIT), [], [], getattr(torch, dtype)
    wanted = torch.randn(batch.tokens.numel(), build("local").rows.local, dtype=dtype)
    strong = "model.init_std=0.2"  # so that attention looks at some tokens more than at others
    models = build("local", strong), build("transformer_engine", strong, "parallel.context=2")
    for ranks, model in enumerate(models, 1):
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(dtype)
        with mock.patch.object(parallel_state, "get_context_parallel_world_size", return_value=ranks):
            logits, number, whole = of_all_ranks(model.to(dtype), batch)
            (logits * wanted[number]).sum().backward()
        found.append(whole)
        gradients.append({te_name(name): parameter.grad for name, parameter in model.named_parameters()})
    local, te = gradients
    for gradient in te.values():
        dist.all_reduce(gradient)
    return {
        "logits": float((found[0] - found[1]).abs().max() / found[0].abs().max()),
        "gradients": {k: float((te[k] - v).abs().max() / v.abs().max()) for k, v in local.items()},
    }


def split_isolation() -> dict[str, bool]:
    """Does another token in the second but last document of the first sequence change logits of others?"""
    model, batch = build("transformer_engine", "parallel.context=2"), batch_of(SPLIT)
    before = of_all_ranks(model, batch)[2]
    batch.tokens[0, 11] += 1
    changed = (of_all_ranks(model, batch)[2] != before).any(-1)
    return {"inside": bool(changed[11:13].all()), "outside": bool(changed[:11].any() or changed[13:].any())}


def split_training(folder: Path, *overrides: str) -> list[list[float]]:
    from megatron_soda.training import trainer

    wanted = ["training.backend=transformer_engine", "checkpoint.save_every=3", *FLAT, *overrides]
    trainer.train(small_recipe(folder, folder.parent / "data", *wanted))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]


def checkpoints(folder: Path) -> dict[str, str]:
    """By 'saved by -> loaded by', the error; or what is not the same."""
    from megatron_soda.training import checkpoint, checkpoint_files

    def delayed() -> Any:
        with fp8(fp8_recipe="delayed"):
            return build("transformer_engine")

    makers = {name: lambda name=name: build(name) for name in ("local", "transformer_engine")} | {"delayed": delayed}
    saved = dict(zip(makers, [*both(), delayed()], strict=True))
    logits_of(saved["delayed"], batch_of()).sum().backward()  # now it has scales to keep
    found = {}
    for writer, model in saved.items():
        path = folder / f"checkpoint_{writer}"
        path.mkdir()
        checkpoint_files.Save(checkpoint.sharded_state([model], None, loading=False), path, False).finish()
        expected = {te_name(k): v for k, v in weights(model).items()}
        for reader, make in makers.items():
            loaded = make()
            error = raised(lambda path=path, loaded=loaded: checkpoint.load(path, [loaded], None))
            same = all(v.equal(expected[te_name(k)]) for k, v in weights(loaded).items())
            found[f"{writer} -> {reader}"] = error or ("" if same else "other weights")
    return found


def training(folder: Path) -> dict[str, list[list[float]]]:
    """Losses and gradient norms of six steps; also of Transformer Engine's layers and Adam, stopped halfway; and of its
    Adam going on, under the distributed optimizer, from where torch's stopped."""
    from megatron_soda.training import optimizer, trainer

    data = folder / "data"

    def train(name: str, backend: str, *steps: int, distributed: bool = False) -> list[list[float]]:
        flat = [f"parallel.distributed_optimizer={distributed}", *FLAT]
        for count in steps:
            wanted = [f"training.backend={backend}", f"training.steps={count}", "checkpoint.save_every=3", *flat]
            trainer.train(small_recipe(folder / name, data, *wanted))
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]

    found = {"local": train("local", "local", 6)}
    train("crossed", "local", 3, distributed=True)
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer.choose_adam = lambda _: ("FusedAdam", FusedAdam, False)
    te = "transformer_engine"
    found["crossed"] = train("crossed", "local", 6, distributed=True)
    return {**found, "straight": train("straight", te, 6), "halves": train("halves", te, 3, 6)}


def for_speed(folder: Path, settings: list[str], slower: list[str]) -> dict[str, Any]:
    """Losses and gradient norms of three steps with the settings, and without; and what was used. With them, the third
    step is another run's in the same process."""
    import torch.distributed as dist

    from megatron_soda.training import step, trainer
    from tests.fakes import te_speed_fake as fake

    # Several buckets, so that one pass does not wait for everything at its beginning.
    step.DistributedDataParallelConfig = functools.partial(step.DistributedDataParallelConfig, bucket_size=4000)
    data, found = folder / "data", {}
    if dist.get_rank() == 0:
        write_data(data)
    dist.barrier()
    for name, more in (("fast", []), ("slow", slower)):
        fake.used.clear()
        for steps in (2, 3) if name == "fast" else (3,):
            wanted = ["training.backend=transformer_engine", f"training.steps={steps}", *FLAT, *settings, *more]
            trainer.train(small_recipe(folder / name, data, *wanted))
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]
        found[f"used {name}"] = dict(fake.used)
    return found


def other_documents() -> dict[str, bool]:
    """Does another token in the second document of the first sequence change logits?"""
    _, te = both()
    batch = batch_of()
    before = logits_of(te, batch)
    batch.tokens[0, 12] += 1
    changed = (logits_of(te, batch) != before).any(-1)
    inside = changed[0, 12:19].clone()
    changed[0, 12:19] = False
    return {"inside": bool(inside.all()), "outside": bool(changed.any())}


@contextlib.contextmanager
def fp8(**settings: Any) -> Iterator[None]:
    """Models built inside have this FP8 configuration."""
    from megatron_soda.model import gpt

    original = gpt.transformer_config
    gpt.transformer_config = lambda recipe: dataclasses.replace(original(recipe), fp8="hybrid", **settings)
    try:
        yield
    finally:
        gpt.transformer_config = original


def fp8_of_layers(**settings: Any) -> list[Any]:
    """By layer, the recipe that its four linear modules ran with: its class, or None; a list if they differ."""
    with fp8(**settings):
        model = build("transformer_engine")
    logits_of(model, batch_of()).sum().backward()
    found = []
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        linear = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
        classes = [type(m.fp8_meta["recipe"]).__name__ if m.fp8 else None for m in linear]
        formats = {m.fp8_meta["recipe"].fp8_format.name for m in linear if m.fp8}
        found.append(classes[0] if len(set(classes)) == 1 and formats <= {"HYBRID"} else [classes, sorted(formats)])
    return found


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return ""


def backends() -> dict[str, str]:
    import torch

    from megatron_soda.parallel import speed

    found = {"auto": speed.original("auto"), "wanted": raised(lambda: speed.original("transformer_engine"))}
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        return {**found, "auto_cuda": speed.original("auto"), "wanted_cuda": speed.original("transformer_engine")}
    finally:
        torch.cuda.is_available = available


def strictness() -> list[str]:
    import torch
    import transformer_engine.pytorch as te

    linear = te.Linear(16, 16, device="cpu", bias=False)
    return [
        raised(lambda: te.Linear(16, 16, device="cpu", unknown=1)),
        raised(lambda: linear(torch.ones(1, 16), unknown=1)),
        raised(lambda: linear(torch.ones(1, 16, dtype=torch.bfloat16))),
        raised(lambda: te.RMSNorm(16, device="cpu", unknown=1)),
        raised(lambda: te.fp8_autocast(recipe=None)),
    ]


def on_one_rank(folder: Path) -> dict[str, Callable[[], Any]]:
    ends = dict(first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
    checks: dict[str, Callable[[], Any]] = {
        "backends": backends,
        "names": names_and_shapes,
        "keys/one": checkpoint_keys,
        "differences/one": differences,
        "differences/tied": lambda: differences("model.tie_embeddings=true"),
        "differences/recompute": lambda: differences("training.recompute=true"),
        "documents": other_documents,
        "strictness": strictness,
        "checkpoints": lambda: checkpoints(folder),
        "training": lambda: training(folder),
        "legal": lambda: split_training(folder / "legal", "training.backend=local", *LEGAL),
        **speed_checks(folder, 1),
        "fp8/delayed/ends": lambda: raised(lambda: fp8_of_layers(fp8_recipe="delayed", **ends)),
    }
    for recipe in ("delayed", "tensorwise", "blockwise"):
        checks[f"fp8/{recipe}"] = lambda recipe=recipe: fp8_of_layers(fp8_recipe=recipe)
    for recipe in ("tensorwise", "blockwise"):
        checks[f"fp8/{recipe}/ends"] = lambda recipe=recipe: fp8_of_layers(fp8_recipe=recipe, **ends)
    return checks


def speed_checks(folder: Path, ranks: int) -> dict[str, Callable[[], Any]]:
    return {
        f"speed/{name}": lambda name=name, rest=rest: for_speed(folder / name, *rest)
        for name, (world, *rest) in FOR_SPEED.items()
        if world == ranks
    }


def run(checks: dict[str, Callable[[], Any]], *overrides: str) -> dict[str, Any]:
    """What each check found, or its trace."""
    import torch

    from megatron_soda.parallel import ranks

    ranks.init(recipe_of("local", *overrides))
    torch.set_num_threads(1)
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


def on_some_ranks(rank: int, world: int, folder: Path, layout: str) -> dict[str, Any]:
    import torch.distributed as dist

    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    stay_on_loopback()
    store = dist.FileStore(f"{folder}/store_{layout}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if layout in MORE:
        return run({f"split/{layout}": lambda: split_training(folder / layout, *MORE[layout][1])}, *MORE[layout][1])
    overrides = LAYOUTS[layout]
    checks: dict[str, Callable[[], Any]] = {f"keys/{layout}": lambda: checkpoint_keys(*overrides)}
    if layout == "cp2":
        checks |= {f"split/{dtype}": lambda dtype=dtype: split_documents(dtype) for dtype in ("float32", "float64")}
        checks |= {
            "split/isolation": split_isolation,
            "split/training": lambda: split_training(folder / "split", *overrides),
            "split/legal": lambda: split_training(folder / "split_legal", *overrides, *LEGAL),
        }
    else:
        checks[f"differences/{layout}"] = lambda: differences(*overrides)
    if layout == "tp2":
        checks |= speed_checks(folder, 2)
    return run(checks, *overrides)


def main(folder: Path, full: bool) -> None:
    from tests.fakes import transformer_engine_fake

    transformer_engine_fake.install()
    from megatron_soda.parallel import ranks, speed  # noqa: F401  ranks must be there before megatron

    from megatron.core.extensions.transformer_engine import TEDotProductAttention  # isort: skip

    TEDotProductAttention.cp_stream = "a stream"  # or it would make one, of CUDA
    speed.original = speed.choose_backend
    speed.choose_backend = lambda wanted: wanted  # there is no CUDA device
    import megatron_soda.model.gpt  # noqa: F401

    results: dict[str, Any] = {}
    write_data(folder / "data")
    for layout in MORE if full else [name for name in LAYOUTS if name != "one"]:
        world = MORE[layout][0] if full else 2
        with mp.get_context("fork").Pool(world) as pool:  # they need not import anything again
            found = pool.starmap(on_some_ranks, [(rank, world, folder, layout) for rank in range(world)], chunksize=1)
        results |= {name: [part[name] for part in found] for name in found[0]}
    alone = {"training": lambda: training(folder)} if full else on_one_rank(folder)
    results |= {name: [value] for name, value in run(alone).items()}
    (folder / "results.json").write_text(json.dumps(results))


# --- the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Any]]:
    """By check, what every rank found."""
    return results_of(tmp_path_factory.mktemp("te"))


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> dict[str, list[Any]]:
    return results_of(tmp_path_factory.mktemp("more_te"), "full")


def results_of(folder: Path, *full: str) -> dict[str, list[Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.test_te_spec", str(folder), *full]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the fake is of a CPU
    log = folder / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        status = child.wait(LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # ranks that wait for each other, too
    assert status == 0, log.read_text(errors="replace")[-4000:]
    return json.loads((folder / "results.json").read_text())


def of(results: dict[str, list[Any]], name: str) -> list[Any]:
    for value in results[name]:
        if isinstance(value, dict) and "error" in value:
            pytest.fail(f"{name}\n{value['error']}")
    return results[name]


def test_the_fake_stays_in_its_process(results):
    assert "transformer_engine" not in sys.modules


def test_the_fake_refuses_what_the_real_one_does(results):
    (found,) = of(results, "strictness")
    assert all(error.startswith("TypeError") for error in found), found


def test_transformer_engine_is_chosen_with_cuda_alone(results):
    (found,) = of(results, "backends")
    assert found["auto"] == "local"
    assert found["wanted"].startswith("SodaError")
    assert found["auto_cuda"] == found["wanted_cuda"] == "transformer_engine"


def test_state_dicts_have_the_same_names_and_shapes(results):
    (found,) = of(results, "names")
    assert found["transformer_engine"] == found["local"]


def test_local_layers_have_nothing_of_transformer_engine(results):
    (found,) = of(results, "names")
    assert found["foreign"] == []


def test_both_start_from_the_same_weights(results):
    (found,) = of(results, "names")
    assert found["other_values"] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_have_the_same_tensors(results, layout):
    for found in of(results, f"keys/{layout}"):
        assert found["transformer_engine"] == found["local"]


NAMES = "local", "transformer_engine", "delayed"


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(a, b) for a in NAMES for b in NAMES],
)
def test_a_checkpoint_of_one_loads_in_the_other(results, writer, reader):
    (found,) = of(results, "checkpoints")
    assert found[f"{writer} -> {reader}"] == ""


CASES = "one", "tp2", "tp2_sequence", "tied", "recompute"


@pytest.mark.parametrize("case", CASES)
def test_logits_of_packed_documents_agree(results, case):
    for found in of(results, f"differences/{case}"):
        assert found["size"] > 1
        assert found["logits"] < 1e-5 * max(1, found["size"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(results, case):
    for found in of(results, f"differences/{case}"):
        assert {k: v for k, v in found["gradients"].items() if not v < 1e-5} == {}


def test_a_document_does_not_see_the_others(results):
    assert of(results, "documents") == [{"inside": True, "outside": False}]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
def test_split_documents_agree_with_masked_attention_on_one_rank(results, dtype, tolerance):
    for found in of(results, f"split/{dtype}"):
        assert found["logits"] < tolerance
        assert {k: v for k, v in found["gradients"].items() if not v < tolerance} == {}


def test_a_split_document_does_not_see_the_others(results):
    assert of(results, "split/isolation") == [{"inside": True, "outside": False}] * 2


def test_training_on_split_documents_is_the_same(results):
    (found,) = of(results, "training")
    for local, split in zip(found["local"], of(results, "split/training")[0], strict=True):
        assert split == pytest.approx(local, abs=1e-5)


def test_rows_of_split_documents_are_those_that_the_grammar_allows(results):
    (found,) = of(results, "legal")
    assert len(found) == 2
    for local, split in zip(found, of(results, "split/legal")[0], strict=True):
        assert split == pytest.approx(local, abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE)
def test_training_on_split_documents_is_the_same_at_more_layouts(more, layout):
    (found,) = of(more, "training")
    for local, split in zip(found["local"], of(more, f"split/{layout}")[0], strict=True):
        assert split == pytest.approx(local, abs=1e-5)


def test_training_is_the_same_and_resumes_bitwise(results):
    (found,) = of(results, "training")
    assert len(found["local"]) == 6
    for local, te in zip(found["local"], found["straight"], strict=True):
        assert te == pytest.approx(local, abs=1e-5)
    assert found["halves"] == found["straight"]


def test_fused_adam_goes_on_from_torchs(results):
    """As on a GPU, from a checkpoint that was made on a CPU."""
    (found,) = of(results, "training")
    assert len(found["crossed"]) == 6
    for local, crossed in zip(found["local"], found["crossed"], strict=True):
        assert crossed == pytest.approx(local, abs=1e-5)


@pytest.mark.parametrize("name", FOR_SPEED)
def test_settings_for_speed_change_nothing(results, name):
    for found in of(results, f"speed/{name}"):
        assert len(found["fast"]) == 3
        for fast, slow in zip(found["fast"], found["slow"], strict=True):
            assert fast == pytest.approx(slow, abs=1e-5)
        what, times = USED[name]
        assert found["used fast"][what] == times
        assert what not in found["used slow"]


CLASSES = {"delayed": "TEDelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


@pytest.mark.parametrize("recipe", CLASSES)
def test_fp8_has_the_recipe_that_is_asked_for(results, recipe):
    assert of(results, f"fp8/{recipe}") == [[CLASSES[recipe]] * 4]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_leaves_the_layers_at_the_ends(results, recipe):
    assert of(results, f"fp8/{recipe}/ends") == [[None, CLASSES[recipe], CLASSES[recipe], None]]


def test_delayed_scaling_takes_all_layers_or_none(results):
    (found,) = of(results, "fp8/delayed/ends")
    assert found.startswith("ValueError: Delayed scaling does not support first / last layer")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "full" in sys.argv)
