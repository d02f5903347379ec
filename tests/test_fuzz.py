"""A small sample of the damage that tests/full/test_fuzz.py does by the thousand."""

from tests.fuzz import fuzz_stores


def test_stores(tmp_path):
    found = fuzz_stores(tmp_path, 60, seed=0)
    assert sum(found.values()) == 60
    assert sum(count for kind, count in found.items() if "refused" in kind) > 50
