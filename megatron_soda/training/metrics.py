"""Writes a run's numbers: to RUN/metrics.jsonl and TensorBoard always, to Weights & Biases if the recipe asks for
it."""

import contextlib
import importlib
import importlib.util
import json
import netrc
import os
import resource
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from ..config import Recipe
from ..errors import SodaError
from ..files import reading, to_json, write_text

# Dense BF16 TFLOP/s of one device, by part of its name (NVIDIA's data sheets). FP8 runs are measured against this too.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflops(recipe: Recipe, device_name: str) -> float | None:
    """For one device: from the recipe, otherwise from the table; None for a device in neither (a CPU)."""
    if recipe.logging.peak_tflops:
        return recipe.logging.peak_tflops
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def mfu(flops_per_token: int, tokens_per_second: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: flops_per_token * tokens_per_second / (devices * peak), as a fraction."""
    return flops_per_token * tokens_per_second / (devices * peak * 1e12) if peak else None


def memory_gib() -> float:
    """Peak memory so far in GiB: of the CUDA device, or this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_wandb(recipe: Recipe) -> None:
    """Raises SodaError, before the model is built, if Weights & Biases is requested but not installed, or has no
    login."""
    if not recipe.logging.wandb_project:
        return
    where = f"logging.wandb_project={recipe.logging.wandb_project}"
    if not _installed("wandb"):
        raise SodaError(
            f"{where}: the package wandb is not installed. "
            "Install it (pip install wandb), or leave the key empty: metrics.jsonl and TensorBoard are always written."
        )
    if os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled") and not _has_login():
        raise SodaError(
            f"{where}: Weights & Biases has no login on this host. Run `wandb login`, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the numbers in the run folder (`wandb sync` uploads them later)."
        )


def _has_login() -> bool:
    """Looks where wandb does: in the environment, then in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec, or a blocked one
        return False


class Metrics:
    """One rank writes. On resume, lines for later steps are dropped."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        run = Path(recipe.run)
        self.path = run / "metrics.jsonl"
        kept = []
        if self.path.is_file():
            with reading(self.path):
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                # Anything else is the last line of a killed run, or damage.
                with contextlib.suppress(SodaError), reading(self.path):
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.file = self.path.open("a", encoding="utf-8")
        self.wandb: Any = None
        if recipe.logging.wandb_project:
            identity = f"{recipe.name}-{zlib.crc32(str(run.resolve()).encode()):08x}"  # a resumed run is the same run
            project = recipe.logging.wandb_project
            try:
                self.wandb = importlib.import_module("wandb").init(
                    project=project, name=recipe.name, id=identity, dir=str(run), resume="allow"
                )
            except Exception as error:  # wandb raises many kinds of errors: wrong key, no network, no such project
                raise SodaError(
                    f"logging.wandb_project={project}: Weights & Biases does not start ({error}). WANDB_MODE=offline "
                    "keeps the numbers in the run folder."
                ) from None

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(to_json({"step": step, **values}) + "\n")
        self.file.flush()
        flat = {}
        for key, value in values.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                if number is not None:
                    flat[f"{key}/{name}" if name else key] = number
        for key, number in flat.items():
            self.board.add_scalar(key, number, step)
        if self.wandb is not None:
            self.wandb.log(flat, step=step)

    def close(self) -> None:
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
