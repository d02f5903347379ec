"""csrc: the CUDA files compile, a build without a compiler installs without, a library that is no good is not used."""

import os
import runpy
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

from megatron_soda.ops import library
from tests.forked import forked

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("device", ["sm_90", *(pytest.param(d, marks=pytest.mark.full) for d in ("sm_80", "sm_100"))])
def test_the_cuda_files_compile(tmp_path, device):
    done = subprocess.run(
        [
            str(NVCC), f"-arch={device}", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-Werror", "all-warnings", "-I", include_paths()[0],
            "-c", str(ROOT / "csrc/cuda/ops.cu"), "-o", str(tmp_path / "ops.o"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@dataclass
class Done:
    returncode: int
    said: str


def run_setup(folder: Path, cuda: str, environment: dict[str, str]) -> Done:
    """In a process of its own: setup.py as with another build of torch, for CUDA's version `cuda` in CUDA_HOME."""
    os.chdir(folder / "source")
    os.environ.clear()
    os.environ.update(environment)
    log = folder / "said"
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.version.cuda = cuda or None
    cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME")
    sys.argv = ["setup.py", "build_ext", "--inplace"]
    try:
        runpy.run_path("setup.py", run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(stop.code, file=sys.stderr)
    except Exception:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return Done(status, log.read_text(errors="replace"))


def build(folder: Path, cuda: str = "", **environment: str) -> Done:
    """setup.py's build of the library from sources without content; `cuda` is the version that torch was built for."""
    source = folder / "source"
    for part in ("cpu/ops.cpp", "cuda/ops.cu"):
        (source / "csrc" / part).parent.mkdir(parents=True)
        (source / "csrc" / part).touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "megatron_soda").mkdir()
    (source / "megatron_soda" / "__init__.py").touch()
    return build_again(folder, cuda, **environment)


def build_again(folder: Path, cuda: str = "", **environment: str) -> Done:
    settings = {key: value for key, value in os.environ.items() if key not in ("SODA_CSRC", "CUDA_HOME", "CUDA_PATH")}
    return forked(run_setup, folder, cuda, {**settings, **environment})


def built_and_note(folder: Path) -> tuple[bool, str]:
    package = folder / "source" / "megatron_soda"
    note = package / "_csrc.txt"
    return (package / "_csrc.abi3.so").is_file(), note.read_text() if note.is_file() else ""


NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}


@pytest.mark.parametrize(
    ("environment", "code", "words", "note"),
    [
        ({**NO_COMPILER, "SODA_CSRC": "auto"}, 0, "WARNING: csrc is not built: ", "/nowhere/c++: not found"),
        ({**NO_COMPILER, "SODA_CSRC": "cpu"}, 1, "/nowhere/c++", ""),
        ({"SODA_CSRC": "none"}, 0, "", "SODA_CSRC=none"),
        ({"SODA_CSRC": "gpu"}, 1, "SODA_CSRC=gpu is not one of auto, cpu, cuda, none", ""),
    ],
    ids=["auto", "cpu", "none", "wrong"],
)
def test_where_it_cannot_be_built(tmp_path, environment, code, words, note):
    done = build(tmp_path, **environment)
    assert done.returncode == code, done.said
    assert words in done.said
    built, reason = built_and_note(tmp_path)
    assert not built
    assert note in reason
    assert bool(note) == bool(reason)
    assert len(reason.splitlines()) <= 1
    if code == 0 and words:
        assert "pip install --no-build-isolation -e ." in done.said


# Stand-ins for nvcc: `nvcc --version` is what torch compares with its own; then one file is compiled, to the -o.
VERSION = 'case "$*" in *--version*) echo "Cuda compilation tools, release %s, V%s.1"; exit ;; esac\n'
COMPILES = 'while [ "$1" != -o ]; do shift; done; exec c++ -c -x c++ /dev/null -o "$2"\n'
TOO_NEW = "echo 'error: -- unsupported GNU version! gcc versions later than 9 are not supported!' >&2; exit 1\n"


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("nvcc", "note"),
    [
        (VERSION % ("13.0", "13.0") + COMPILES, "cannot find -lcudart"),
        (VERSION % ("11.0", "11.0") + COMPILES, "The detected CUDA version (11.0) mismatches"),
        (VERSION % ("13.0", "13.0") + TOO_NEW, "unsupported GNU version! gcc versions later than 9"),
        ("echo 'nvcc: no licence' >&2; exit 3\n", "returned non-zero exit status 3"),
        (None, "there is no nvcc"),
    ],
    ids=["no-runtime", "old", "new-compiler", "broken", "absent"],
)
def test_without_cuda_the_cpu_kernels_are_built(tmp_path, nvcc, note):
    program = tmp_path / "cuda/bin/nvcc"
    program.parent.mkdir(parents=True)
    if nvcc is not None:
        program.write_text("#!/bin/sh\n" + nvcc)
        program.chmod(0o755)
    done = build(tmp_path, cuda="13.0", CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.said
    built, reason = built_and_note(tmp_path)
    assert built, done.said
    assert note in reason
    assert f"WARNING: csrc is built without its CUDA kernels: {reason}" in done.said


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_an_old_note_goes_away(tmp_path):
    assert build(tmp_path, **NO_COMPILER).returncode == 0
    assert built_and_note(tmp_path)[1]
    done = build_again(tmp_path)
    assert done.returncode == 0, done.said
    assert built_and_note(tmp_path) == (True, "")


def why_absent(*libraries: Path) -> list[str]:
    """What a fresh process says of these libraries, one after the other; it must work without them."""
    program = (
        "import sys, pathlib, torch\n"
        "from megatron_soda.ops import library\n"
        "from megatron_soda import ops\n"
        "from megatron_soda.commands.doctor import checks\n"
        "for path in sys.argv[1:]:\n"
        "    library.path, library.why_absent = pathlib.Path(path), 'not loaded yet'\n"
        "    library.load()\n"
        "    assert ops.pack_frames(torch.tensor([[1, 2]], dtype=torch.int32), 4).tolist() == [[0x21]]\n"
        "    assert library.find('pack_frames', 'cpu') is None and not library.has_cuda()\n"
        "    library.set_simd(False)\n"
        "    row = next(row for row in checks() if row[0] == 'csrc kernels')\n"
        "    assert row[1] is False and library.why_absent in row[2] and '--no-build-isolation' in row[3], row\n"
        "    print(library.why_absent)"
    )
    # The package's own library must stay out of the process: one of two libraries of the same ops would not load.
    copy = libraries[0].parent / "copy" / "megatron_soda"
    if not copy.exists():
        shutil.copytree(ROOT / "megatron_soda", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, libraries)],
        cwd=copy.parent,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_library_that_cannot_be_loaded(tmp_path):
    nothing, noted, garbage = (tmp_path / name / "x.so" for name in ("nothing", "noted", "garbage"))
    for path in (nothing, noted, garbage):
        path.parent.mkdir()
    (noted.parent / "_csrc.txt").write_text("/bin/sh: 1: c++: not found\n")
    garbage.write_bytes(b"no library at all" * 100)
    *absent, damaged = why_absent(nothing, noted, garbage)
    assert absent == ["not built", "not built (/bin/sh: 1: c++: not found)"]
    assert damaged.startswith("it cannot be loaded (")


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
        (STALE, 0, f"stale: version 0, {library.VERSION} is wanted"),
        (STALE, library.VERSION, "stale: pack_frames, unpack_frames, "),
        ("", 1, f"stale: version unknown, {library.VERSION} is wanted"),
    ],
    ids=["foreign", "version", "ops", "empty"],
)
def test_a_library_of_another_build(tmp_path, source, version, words):
    (tmp_path / "other.cpp").write_text(source)
    subprocess.run(
        [
            str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-DVERSION={version}",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", include_paths()[0],
            "other.cpp", "-o", "other.so",
            *(f"-L{folder}" for folder in library_paths()), "-lc10", "-ltorch_cpu",
        ],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    assert why_absent(tmp_path / "other.so")[0].startswith(words)
