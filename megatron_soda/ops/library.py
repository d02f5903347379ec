"""The library built from csrc/: loads it once, and records why it is absent. Nothing here raises: without it, torch
code runs."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

VERSION = 4  # as in csrc/cpu/ops.cpp; incremented in both whenever an op changes its meaning or its arguments
CPU_OPS = (
    *("pack_frames", "unpack_frames", "expand_windows", "build_batch", "best_fit", "first_illegal", "hash_documents"),
    *("linear", "norm_and_rotate", "attend", "set_simd"),
)
REBUILD = "pip install --no-build-isolation -e . (in the source tree, with a C++ compiler)"

path = Path(__file__).resolve().parent.parent / "_csrc.abi3.so"
why_absent: str | None = "not loaded yet"  # None: the library is loaded and its ops are used


def load() -> None:
    """Loads the library and sets `why_absent`. Does nothing if it is already loaded."""
    global why_absent
    if why_absent is None:
        return
    find.cache_clear()
    if not path.is_file():
        reason = _note()
        why_absent = f"not built ({reason})" if reason else "not built"
        return
    try:
        ctypes.CDLL(str(path))  # its ops register themselves
    except OSError as error:
        why_absent = _why(str(error).strip())
        return
    why_absent = _why_stale()


def _note() -> str:
    """setup.py's note on why the library, or its CUDA kernels, were not built."""
    try:
        return path.with_name("_csrc.txt").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def describe() -> str:
    """Describes, for users, what does csrc's work here, and why if that is less than possible."""
    if why_absent is not None:
        return f"torch code does the work of csrc: {why_absent}"
    if has_cuda():
        return "CPU and CUDA kernels"
    return f"CPU kernels; none for CUDA ({reason})" if (reason := _note()) else "CPU kernels"


def _why(error: str) -> str:
    """The loader's message in one short line. A missing symbol means that it was built for another torch."""
    last = error.splitlines()[-1] if error else "it cannot be loaded"
    last = last.replace(f"{path}: ", "")
    if "undefined symbol" in last:
        return f"built for another torch than {torch.__version__} ({last[:80]})"
    return f"it cannot be loaded ({last[:80]})"


def _why_stale() -> str | None:
    found = _version()
    if found != VERSION:
        return f"stale: version {'unknown' if found is None else found}, {VERSION} is wanted"
    missing = [name for name in CPU_OPS if not _has(name, "CPU") and not _has(name, "CompositeExplicitAutograd")]
    return f"stale: {', '.join(missing)} missing" if missing else None


def _version() -> int | None:
    try:
        return int(torch.ops.megatron_soda.version())
    except (AttributeError, RuntimeError):
        return None


def _has(name: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_soda::{name}", key)
    except RuntimeError:  # there is no such op
        return False


@cache
def find(name: str, device: str) -> Callable | None:
    """The native op for a device type ("cpu", "cuda"), or None if torch must do it."""
    if why_absent is not None or not _has(name, device.upper()):
        return None
    return getattr(torch.ops.megatron_soda, name)


def has_cuda() -> bool:
    """Whether the library also has the CUDA kernels."""
    return why_absent is None and _has("unpack_frames", "CUDA")


def set_simd(on: bool) -> None:
    """Allows (the default) or forbids the CPU kernels to use vector instructions."""
    if why_absent is None:
        torch.ops.megatron_soda.set_simd(on)
