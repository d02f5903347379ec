"""Damage by the thousand: nothing crashes, hangs, or becomes something else without a word. Counts are printed (-s)."""

import pytest

from tests.fuzz import fuzz_stores

pytestmark = pytest.mark.full


def test_stores(tmp_path):
    found = fuzz_stores(tmp_path, 2000, seed=1)
    print(dict(sorted(found.items())))
    assert sum(found.values()) == 2000
    for suffix in ("json", "bin", "idx", "spans", "text", "frames"):
        assert found[f"{suffix}: refused"] > 150
