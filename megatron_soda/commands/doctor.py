"""`soda doctor`: versions, what is accelerated, what falls back, what to install for more. Needs no optional
package."""

import importlib
import importlib.util
import os
import platform
import shutil
from importlib import metadata


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a broken optional package can raise anything
        return False
    return True


def checks() -> list[tuple[str, bool, str, str]]:
    """(what, whether it is there, current state, what to do for more)"""
    import torch

    from ..ops import library

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    te, dali = _version("transformer-engine"), _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120")
    judges = _version("faster-whisper") and "faster-whisper" + (", Resemblyzer" if _version("Resemblyzer") else "")
    # PyPI's `apex` is an unrelated project; NVIDIA's has this module.
    apex = importlib.util.find_spec("amp_C") is not None and _imports("apex.optimizers")
    nccl = torch.distributed.is_nccl_available() and cuda
    return [
        ("device", cuda, device, "an NVIDIA GPU and a CUDA build of torch"),
        ("communication", nccl, "NCCL" if nccl else "gloo", "comes with a CUDA device"),
        (
            "Transformer Engine",
            bool(te) and cuda,
            te or "absent: megatron-core's local layers, no FP8",
            "pip install transformer-engine[pytorch]",
        ),
        (
            "apex",
            apex,
            "fused optimizer" if apex else "absent: torch's AdamW",
            "build NVIDIA/apex from source (PyPI's `apex` is an unrelated project)",
        ),
        (
            "csrc kernels",
            library.why_absent is None and (library.has_cuda() or not cuda),
            library.describe(),
            library.REBUILD,
        ),
        (
            "DALI",
            bool(dali),
            dali or "absent: soundfile, PyAV and soxr decode",
            "pip install megatron-soda[dali], prepare.decoder=dali_gpu (or dali); on a CPU soundfile is as fast",
        ),
        (
            "judges",
            bool(judges),
            judges or "absent: evaluate.judges must be []",
            "pip install 'megatron-soda[judges]' (docs/evaluation.md)",
        ),
        (
            "apt-get, dpkg-deb",
            bool(shutil.which("apt-get") and shutil.which("dpkg-deb")),
            "the quickstart's speech can be downloaded" if shutil.which("apt-get") else "absent",
            "use your own speech: bash examples/quickstart/run.sh --speech DIR",
        ),
    ]


EXAMPLES = ("soda doctor",)


def command() -> None:
    """Show what is installed, what is accelerated, what falls back, and what to install for more."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"Python {platform.python_version()} on {platform.platform()}", highlight=False)
    versions = Table("package", "version", box=None)
    for name in (
        "megatron-soda",
        "torch",
        "megatron-core",
        "transformers",
        "sentencepiece",
        "numpy",
        "soundfile",
        "av",
    ):
        versions.add_row(name, _version(name) or "[red]missing[/]")
    console.print(versions)
    table = Table("part", "", "now", "for more", box=None)
    for what, there, now, more in checks():
        table.add_row(what, "[green]yes[/]" if there else "[yellow]no[/]", escape(now), "" if there else escape(more))
    console.print(table)
