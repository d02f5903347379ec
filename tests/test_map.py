"""The README's map is the tree: what it names is there, and every module is found by it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHOLE = (
    "report",
    "hf",
    "codecs",
    "ops",
    "config",
    "commands",
    "sources",
    "tasks",
    "suites",
    "judges",
    "inference",
    "evaluation",
    "serving",
)
NOT_SHOWN = {"__init__.py", "progress.py", "console.py", "files.py"}


@pytest.fixture(scope="module")
def named() -> set[str]:
    """Names of files and folders (with a slash) in the map."""
    block = re.search(r"## The map.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    return set(re.findall(r"[\w./]*[\w]+(?:\.py|\.sh|/)(?=[\s,;:]|$)", block[1]))


def test_what_the_map_names_is_there(named):
    assert len(named) > 60
    missing = [name for name in named if not any(ROOT.glob(f"**/{name.rstrip('/')}"))]
    assert not missing


def test_every_module_is_found(named):
    shown = {Path(name).name for name in named}
    missing = [
        str(path.relative_to(ROOT))
        for package in ("megatron_soda", "data_prep")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name not in {*NOT_SHOWN, *shown} and path.parent.name not in WHOLE
    ]
    assert not missing
