"""Who may import whom: one direction, and no circle. Imports inside of functions count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_soda", "data_prep")
ENGINE = ("training", "model", "parallel", "hf", "evaluation", "inference", "report", "commands", "train", "cli")


def modules() -> dict[str, Path]:
    """Dotted names, those of packages without `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: set[str], source: str | None = None) -> set[str]:
    """The modules of ours that a module names, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names} & known
            found |= names
            if len(names) < len(node.names):  # something else than submodules
                found.add(module)
    return (found & known) - {name}


KNOWN = modules()
IMPORTS = {name: imports_of(name, path, set(KNOWN)) for name, path in KNOWN.items()}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(importers: tuple[str, ...], imported: tuple[str, ...]) -> list[str]:
    return [
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        if inside(name, *importers)
        for other in sorted(others)
        if inside(other, *imported)
    ]


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"megatron_soda.{name}" for name in names)


def test_imports_are_found():
    source = "import megatron_soda.vocab\ndef f():\n    from ..files import read_json\n    from .. import errors\n"
    path = ROOT / "megatron_soda/data/store.py"
    found = imports_of("megatron_soda.data.store", path, set(KNOWN), source)
    assert found == set(ours("vocab", "files", "errors"))
    assert "data_prep.prepare" in IMPORTS["megatron_soda.commands.prepare"]
    assert len(KNOWN) > 100


def test_only_commands_name_data_prep():
    wrong = [x for x in forbidden(("megatron_soda",), ("data_prep",)) if not x.startswith("megatron_soda.commands.")]
    assert not wrong


def test_preparation_needs_no_engine():
    assert not forbidden(("data_prep",), ours(*ENGINE))


def test_only_the_entry_names_commands():
    wrong = [x for x in forbidden(("megatron_soda",), ours("commands")) if not x.startswith(ours("commands", "cli"))]
    assert not wrong


def test_training_knows_nothing_of_what_follows_it():
    """But for evaluations.py, which checks the suites of evaluation while training and starts the process for them."""
    found = forbidden(ours("training", "model", "parallel"), ours("hf", "evaluation", "inference", "report"))
    assert not [one for one in found if not one.startswith("megatron_soda.training.evaluations -> ")]


def test_data_audio_and_codecs_are_below_the_engine():
    assert not forbidden(ours("data", "audio", "codecs", "ops", "vocab", "tokenizer", "files"), ours(*ENGINE))


def test_the_report_reads_files_alone():
    allowed = ours("report", "files", "errors", "run_folder", "audio.judge", "registry", "evaluation.suite")
    wrong = [x for x in forbidden(ours("report"), PACKAGES) if not inside(x.split(" -> ")[1], *allowed)]
    assert not wrong


def test_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(KNOWN):
        visit(name, ())
