"""A small sample of the damage that tests/full/test_fuzz.py does by the thousand."""

import pytest

from megatron_soda.ops import library
from tests.fuzz import fuzz_stores
from tests.fuzz_files import fuzz_readers, fuzz_sounds
from tests.fuzz_kernels import fuzz_kernels


def test_stores(tmp_path):
    found = fuzz_stores(tmp_path, 60, seed=0)
    assert sum(found.values()) == 60
    assert sum(count for kind, count in found.items() if "refused" in kind) > 50


def test_sounds(tmp_path):
    found = fuzz_sounds(tmp_path, 60, seed=0)
    assert sum(count for kind, count in found.items() if ": " in kind) == 60


def test_readers(tmp_path):
    found = fuzz_readers(tmp_path, 60, seed=0)
    assert sum(found.values()) == 60
    assert sum(count for kind, count in found.items() if "refused" in kind) > 20


def test_kernels():
    if library.why_absent:
        pytest.skip(f"csrc: {library.why_absent}")
    assert sum(fuzz_kernels(600, seed=0).values()) == 600
