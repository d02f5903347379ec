"""Damage by the thousand: nothing crashes, hangs, or becomes something else without a word. Counts are printed (-s)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from megatron_soda.ops import library
from tests.fuzz import fuzz_stores
from tests.fuzz_files import SOUNDS, fuzz_readers, fuzz_sounds

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parent.parent.parent


def test_stores(tmp_path):
    found = fuzz_stores(tmp_path, 2000, seed=1)
    print(dict(sorted(found.items())))
    assert sum(found.values()) == 2000
    for suffix in ("json", "bin", "idx", "spans", "text", "frames"):
        assert found[f"{suffix}: refused"] > 150


def test_sounds(tmp_path):
    found = fuzz_sounds(tmp_path, 800, seed=1)
    print(dict(sorted(found.items())))
    assert sum(count for kind, count in found.items() if ": " in kind) == 800
    for kind in SOUNDS:
        assert found[f"{kind}: read"] + found[f"{kind}: refused"] > 30


def test_readers(tmp_path):
    found = fuzz_readers(tmp_path, 1500, seed=1)
    print(dict(sorted(found.items())))
    assert sum(found.values()) == 1500


def test_kernels_under_address_sanitizer(tmp_path):
    """The kernels as they are, in a library of their own, so that a read outside an array is an error."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    libraries = [_library(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    if not all(path.is_absolute() for path in libraries):
        pytest.skip(f"{compiler} has no AddressSanitizer")
    copy = tmp_path / "source"  # the package loads the library that lies in it
    shutil.copytree(ROOT / "megatron_soda", copy / "megatron_soda", ignore=shutil.ignore_patterns("_csrc*"))
    (copy / "tests").mkdir()
    for name in ("__init__.py", "fuzz_kernels.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    command = [compiler, "-std=c++20", "-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer", "-shared", "-fPIC"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += [str(ROOT / "csrc/cpu/ops.cpp"), "-o", str(copy / "megatron_soda" / library.path.name)]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, cwd=ROOT)
    environment = {**os.environ, "LD_PRELOAD": " ".join(map(str, libraries)), "PYTHONPATH": str(copy)}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    rounds = [sys.executable, "-m", "tests.fuzz_kernels", "20000", "1"]
    done = subprocess.run(rounds, cwd=copy, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[:4000]


def _library(compiler: str, name: str) -> Path:
    """Where the compiler has it; the bare name if it has not."""
    command = [compiler, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
