"""Settings that make training faster and change nothing else: which are on, by the recipe, the device and what is
installed. Imports none of the engine."""

import importlib.util
from dataclasses import asdict, dataclass

from ..config import Recipe
from ..config.fields import need
from ..errors import SodaError

TE_LAYERS = "needs Transformer Engine's layers (a CUDA device and the package transformer-engine; see `soda doctor`)"


@dataclass(frozen=True)
class Speed:
    """What was chosen; for a fused function, whose it is (empty: off)."""

    overlap_gradients: bool
    overlap_parameters: bool
    overlap_tensor: bool
    fuse_swiglu: str
    fuse_rope: str
    fuse_gradients: bool
    cuda_graphs: bool

    def line(self) -> str:
        words = {True: "on", False: "off", "": "off"}
        return ", ".join(f"{name} {words.get(value, value)}" for name, value in asdict(self).items())


def choose_backend(wanted: str) -> str:
    """`training.backend` -> "transformer_engine" or "local". Raises SodaError if the wanted one cannot be had."""
    import torch

    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "auto":
        return "transformer_engine" if installed and torch.cuda.is_available() else "local"
    if wanted == "transformer_engine" and not (installed and torch.cuda.is_available()):
        raise SodaError(
            "training.backend=transformer_engine needs a CUDA device and the package transformer-engine; "
            "training.backend=local runs without. `soda doctor` shows what is there."
        )
    return wanted


def check_speed(recipe: Recipe) -> None:
    """Raises SodaError for a setting that contradicts another one, on any machine."""
    w, t, dtype = recipe.parallel, recipe.training, recipe.precision.dtype
    need(
        not w.overlap_gradients or w.pipeline == 1,
        "parallel.overlap_gradients does not go with pipeline stages: with them, the head's gradients are complete "
        "before the last backward pass. Leave it out, or set parallel.pipeline=1",
    )
    if w.overlap_parameters:
        key = "parallel.overlap_parameters gathers the parameters that ranks have updated"
        need(w.distributed_optimizer, f"{key} for each other: it needs parallel.distributed_optimizer=true")
        need(
            w.overlap_gradients is not False and w.pipeline == 1,
            f"{key} bucket by bucket, and there are buckets only with parallel.overlap_gradients=true (and "
            "parallel.pipeline=1)",
        )
    for key, wanted in (("parallel.overlap_tensor", w.overlap_tensor), ("training.cuda_graphs", t.cuda_graphs)):
        need(
            not wanted or w.context == 1,
            f"{key} works on micro-batches of one size: with parallel.context={w.context} documents are padded, and "
            "sizes differ. Leave it out, or set parallel.context=1",
        )
    if w.overlap_tensor:
        key = "parallel.overlap_tensor hides exchanges between tensor-parallel ranks behind matrix products"
        need(w.tensor > 1 and w.sequence, f"{key}: it needs parallel.tensor of 2 or more and parallel.sequence=true")
        need(dtype != "fp32", f"{key}, in buffers of bf16: it needs precision.dtype=bf16 or fp8")
        need(
            dtype != "fp8" or recipe.precision.fp8_recipe != "blockwise",
            f"{key}, whose buffers Transformer Engine does not fill with blockwise FP8: it needs "
            "precision.fp8_recipe=tensorwise or delayed",
        )
    if t.cuda_graphs:
        key = "training.cuda_graphs"
        need(dtype != "fp32", f"{key} are captured in bf16: they need precision.dtype=bf16 or fp8")
        need(
            w.pipeline == 1,
            f"{key} have room for one micro-batch: parallel.pipeline={w.pipeline} has several on their way. Leave it "
            "out, or set parallel.pipeline=1",
        )
        need(not t.recompute, f"{key} keep what the backward pass needs: they do not go with training.recompute=true")


def choose_speed(recipe: Recipe, replicas: int = 1) -> Speed:
    """The choice on this machine, with `replicas` ranks that have the same part of the model (context-parallel ones
    included). Raises SodaError if a setting asks for what is not there."""
    import torch

    engine = choose_backend(recipe.training.backend) == "transformer_engine"
    return choose(recipe, replicas, cuda=torch.cuda.is_available(), engine=engine)


def choose(recipe: Recipe, replicas: int, *, cuda: bool, engine: bool) -> Speed:
    """engine: whether the layers are Transformer Engine's."""
    w, t = recipe.parallel, recipe.training
    for key, wanted in (
        ("parallel.overlap_tensor", w.overlap_tensor),
        ("training.fuse_gradients", t.fuse_gradients),
        ("training.cuda_graphs", t.cuda_graphs),
    ):
        need(engine or not wanted, f"{key}=true {TE_LAYERS}")
    need(engine or not (t.fuse_rope and cuda), f"training.fuse_rope=true on CUDA {TE_LAYERS}")
    need(
        not (engine and cuda) or w.context == 1 or recipe.precision.dtype != "fp32",
        f"parallel.context={w.context}: between ranks, Transformer Engine's attention takes bf16 alone; set "
        "precision.dtype=bf16 or fp8, or training.backend=local",
    )
    split = replicas > 1 and w.pipeline == 1
    gradients = split and _or(w.overlap_gradients, cuda or bool(w.overlap_parameters))
    triton = cuda and importlib.util.find_spec("triton") is not None
    rope = "transformer_engine" if engine else "torch"
    return Speed(
        overlap_gradients=gradients,
        overlap_parameters=gradients and w.distributed_optimizer and _or(w.overlap_parameters, cuda),
        overlap_tensor=bool(w.overlap_tensor),
        fuse_swiglu=("triton" if triton else "torch") if _or(t.fuse_swiglu, True) else "",
        fuse_rope=rope if _or(t.fuse_rope, engine or not cuda) else "",
        fuse_gradients=_or(t.fuse_gradients, engine),
        cuda_graphs=bool(t.cuda_graphs),
    )


def _or(wanted: bool | None, default: bool) -> bool:
    return default if wanted is None else wanted
