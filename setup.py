"""Settings are in pyproject.toml. This file builds csrc/ into megatron_soda/_csrc.abi3.so, if it can.

SODA_CSRC=auto | cpu | cuda | none. auto: with the CUDA kernels if torch has CUDA and nvcc is there; where it cannot be
built the package is installed without it, and torch code does its work. cpu, cuda: a failure is an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ADVICE = "The package works without it, slower. To build it: pip install --no-build-isolation -e . (see csrc/README.md)"
LIBRARY = Path("megatron_soda/_csrc.abi3.so")  # of an editable install
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11; newer ones load it, too


def warn(what: str) -> None:
    lines = [f"WARNING: csrc is not built: {what}", ADVICE]
    print("", "*" * 100, *lines, "*" * 100, "", sep="\n", file=sys.stderr, flush=True)


def extension(mode: str) -> dict:
    """setup()'s arguments that build csrc; none if it is not to be built."""
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"error: SODA_CSRC={mode} is not one of auto, cpu, cuda, none")
    if mode == "none":
        LIBRARY.unlink(missing_ok=True)  # an old one must not be used in its place
        return {}
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        if mode != "auto":
            sys.exit(f"error: SODA_CSRC={mode}, but torch cannot be imported: {error}")
        warn(f"torch cannot be imported ({error}); pip's build isolation hides it")
        return {}
    nvcc = cpp.CUDA_HOME and (Path(cpp.CUDA_HOME) / "bin" / "nvcc").is_file()
    cuda = mode == "cuda" or (mode == "auto" and torch.version.cuda is not None and bool(nvcc))
    if cuda and not torch.cuda.is_available():  # else torch asks the device
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

    class Build(cpp.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if mode != "auto":
                    raise
                self.extensions = []
                LIBRARY.unlink(missing_ok=True)
                hint = " (SODA_CSRC=cpu builds it without the CUDA kernels)" if cuda else ""
                warn((str(error).strip() or type(error).__name__).splitlines()[-1] + hint)

    built = (cpp.CUDAExtension if cuda else cpp.CppExtension)(
        "megatron_soda._csrc",
        ["csrc/cpu/ops.cpp"] + ["csrc/cuda/ops.cu"] * cuda,
        depends=[str(path) for path in sorted(Path("csrc").rglob("*.*h"))],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fvisibility=hidden", *STABLE_ABI],
            "nvcc": ["-O3", "-DUSE_CUDA", *STABLE_ABI],
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [built],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension(os.environ.get("SODA_CSRC", "auto")))
