"""csrc: the CUDA files compile, a build without a compiler installs without, a library that is no good is not used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_cuda_files_compile(tmp_path):
    done = subprocess.run(
        [
            str(NVCC), "-arch=sm_90", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-Werror", "all-warnings", "-I", cpp_extension.include_paths()[0],
            "-c", str(ROOT / "csrc/cuda/ops.cu"), "-o", str(tmp_path / "ops.o"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py's build of the library, in a copy of what it needs."""
    source = folder / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "megatron_soda").mkdir()
    (source / "megatron_soda" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "made", "--build-temp", "temporary"]
    return subprocess.run(
        command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({**NO_COMPILER, "SODA_CSRC": "auto"}, 0, "WARNING: csrc is not built"),
        ({**NO_COMPILER, "SODA_CSRC": "cpu"}, 1, "/nowhere/c++"),
        ({"SODA_CSRC": "none"}, 0, ""),
        ({"SODA_CSRC": "gpu"}, 1, "SODA_CSRC=gpu is not one of auto, cpu, cuda, none"),
    ],
    ids=["auto", "cpu", "none", "wrong"],
)
def test_where_it_cannot_be_built(tmp_path, environment, code, words):
    done = build(tmp_path, **environment)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
    if code == 0 and words:
        assert "pip install --no-build-isolation -e ." in done.stderr


def why_absent(library: Path) -> str:
    """What a fresh process says of this library; it must work without it."""
    program = (
        "import sys, pathlib, torch\n"
        "from megatron_soda.ops import library\n"
        "library.path, library.why_absent = pathlib.Path(sys.argv[1]), 'not loaded yet'\n"
        "library.load()\n"
        "from megatron_soda import ops\n"
        "assert ops.pack_frames(torch.tensor([[1, 2]], dtype=torch.int32), 4).tolist() == [[0x21]]\n"
        "assert library.find('pack_frames', 'cpu') is None and not library.has_cuda()\n"
        "library.set_simd(False)\n"
        "from megatron_soda.doctor import checks\n"
        "row = next(row for row in checks() if row[0] == 'csrc kernels')\n"
        "assert row[1] is False and library.why_absent in row[2] and '--no-build-isolation' in row[3], row\n"
        "print(library.why_absent)"
    )
    # The package's own library must stay out of the process: one of two libraries of the same ops would not load.
    copy = library.parent / "copy" / "megatron_soda"
    if not copy.exists():
        shutil.copytree(ROOT / "megatron_soda", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(library)],
        cwd=copy.parent,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_library_that_cannot_be_loaded(tmp_path):
    assert why_absent(tmp_path / "nothing.so") == "not built"
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"no library at all" * 100)
    assert why_absent(garbage).startswith("it cannot be loaded (")


FOREIGN = 'extern "C" int torch_no_such_function();\nint foreign = torch_no_such_function();\n'
STALE = """
#include <torch/csrc/stable/library.h>
int64_t version() { return VERSION; }
STABLE_TORCH_LIBRARY(megatron_soda, m) { m.def("version() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(megatron_soda, CompositeExplicitAutograd, m) { m.impl("version", TORCH_BOX(&version)); }
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("source", "version", "words"),
    [
        (FOREIGN, 1, f"built for another torch than {torch.__version__} (undefined symbol: torch_no_such_function"),
        (STALE, 0, "stale: version 0, 1 is wanted"),
        (STALE, 1, "stale: pack_frames, unpack_frames, "),
        ("", 1, "stale: version unknown, 1 is wanted"),
    ],
    ids=["foreign", "version", "ops", "empty"],
)
def test_a_library_of_another_build(tmp_path, source, version, words):
    (tmp_path / "other.cpp").write_text(source)
    subprocess.run(
        [
            str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-DVERSION={version}",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", cpp_extension.include_paths()[0],
            "other.cpp", "-o", "other.so",
            *(f"-L{folder}" for folder in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu",
        ],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    assert why_absent(tmp_path / "other.so").startswith(words)
