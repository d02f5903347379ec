"""Settings are in pyproject.toml. This file builds csrc/ into megatron_soda/_csrc.abi3.so, if it can.

SODA_CSRC=auto | cpu | cuda | none. auto: with the CUDA kernels if torch has CUDA and nvcc is there; without, if they
cannot be built; and if nothing can be built the package is installed without the library: torch code does its work.
cpu, cuda: a failure is an error. What is missing is said in one line, kept beside the library for `soda doctor`.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup

ADVICE = "The package works without it, slower. To build it: pip install --no-build-isolation -e . (see csrc/README.md)"
PACKAGE = Path("megatron_soda")
LIBRARY, NOTE = "_csrc.abi3.so", "_csrc.txt"  # NOTE: why the library, or its CUDA kernels, are not there
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11; newer ones load it, too
AN_ERROR = re.compile(r"\berror:|cannot find|not found|No such file|unsupported|No space left|Killed")


def tell(missing: str, reason: str, *folders: Path) -> None:
    """Says what is missing and why, and writes the reason down; without a reason removes an old one."""
    for folder in (PACKAGE, *folders):
        if reason and folder.is_dir():
            (folder / NOTE).write_text(reason + "\n", encoding="utf-8")
        else:
            (folder / NOTE).unlink(missing_ok=True)
    if reason:
        lines = [f"WARNING: {missing}: {reason}", ADVICE]
        print("", "*" * 100, *lines, "*" * 100, "", sep="\n", file=sys.stderr, flush=True)


@contextmanager
def output_to(path: str) -> Iterator[None]:
    """What this process and its children print goes to a file, and is printed at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = [os.dup(1), os.dup(2)]
    with open(path, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), terminal, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        print(Path(path).read_text(errors="replace"), file=sys.stderr, flush=True)


def why(error: Exception, output: str) -> str:
    """In one line. An exception says only that a command failed; the first error the command printed says why."""
    printed = (line.strip() for line in output.splitlines() if AN_ERROR.search(line))
    text = str(error).strip() or type(error).__name__
    if len(error.args) > 1 and "%s" in str(error.args[0]):  # torch leaves one of its messages unformatted
        text = error.args[0] % error.args[1:]
    return next(printed, text.splitlines()[-1])[:200]


def shared_libstdcxx() -> list[str]:
    """The C++ library that torch has loaded. A compiler may link its own statically, and then an error thrown by csrc
    crashes the process, because torch catches it with another copy of the library."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sorted({line.split(maxsplit=5)[5].strip() for line in maps if "/libstdc++.so.6" in line})[:1]


def extension(mode: str) -> dict:
    """setup()'s arguments that build csrc; none if it is not to be built."""
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"error: SODA_CSRC={mode} is not one of auto, cpu, cuda, none")
    reason = "SODA_CSRC=none" if mode == "none" else ""
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        if mode in ("cpu", "cuda"):
            sys.exit(f"error: SODA_CSRC={mode}, but torch cannot be imported: {error}")
        reason = reason or f"torch cannot be imported ({error}); pip's build isolation hides it"
    if reason:
        (PACKAGE / LIBRARY).unlink(missing_ok=True)  # an old one must not be used in its place
        tell("csrc is not built", reason)
        return {}

    def make(cuda: bool):
        return (cpp.CUDAExtension if cuda else cpp.CppExtension)(
            "megatron_soda._csrc",
            ["csrc/cpu/ops.cpp"] + ["csrc/cuda/ops.cu"] * cuda,
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.*h"))],
            extra_compile_args={
                "cxx": ["-O3", "-g0", "-fvisibility=hidden", *STABLE_ABI],
                "nvcc": ["-O3", "-DUSE_CUDA", *STABLE_ABI],
            },
            extra_link_args=shared_libstdcxx(),
            py_limited_api=True,
        )

    attempts = [mode == "cuda"]  # with CUDA?
    no_cuda = ""
    if mode == "auto" and torch.version.cuda is not None:
        if cpp.CUDA_HOME and (Path(cpp.CUDA_HOME) / "bin" / "nvcc").is_file():
            attempts = [True, False]
        else:
            no_cuda = "there is no nvcc (CUDA_HOME says where the CUDA toolkit is)"
    if attempts[0] and not torch.cuda.is_available():  # else torch asks the device
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

    class Build(cpp.BuildExtension):
        def build_extensions(self) -> None:
            missing, reason = "csrc is built without its CUDA kernels", no_cuda
            for cuda in attempts:
                failure = self._build(cuda)
                if not failure:
                    break
                reason = failure
            else:
                missing = "csrc is not built"
                self.extensions = []
                (PACKAGE / LIBRARY).unlink(missing_ok=True)
            tell(missing, reason, Path(self.build_lib) / PACKAGE)

        def _build(self, cuda: bool) -> str:
            """Why it failed, or ""."""
            with tempfile.TemporaryDirectory() as folder:
                log = f"{folder}/log"
                try:
                    with output_to(log):
                        vars(self.extensions[0]).update(vars(make(cuda)))
                        super().build_extensions()
                except Exception as error:
                    if mode != "auto":
                        raise
                    return why(error, Path(log).read_text(errors="replace"))
            return ""

    return {
        "ext_modules": [make(cuda=False)],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension(os.environ.get("SODA_CSRC", "auto")))
