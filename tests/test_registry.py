"""Suites and tasks are found by their files, and naming them costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.registry import JUDGES, SUITES, TASKS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "megatron", "rich", "soundfile", "pyarrow")


def loaded(code: str) -> set[str]:
    """Which top-level packages a fresh interpreter holds after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split())


def test_names_are_those_of_the_files():
    pairs = ("salmon", "sblimp", "sstorycloze", "swuggy", "tblimp", "tstorycloze", "twuggy")
    others = ("asr", "continuation", "gain", "grammar", "nll", "s2st", "translation", "tts")
    assert SUITES.names() == tuple(sorted((*pairs, *others)))
    assert JUDGES.names() == ("dnsmos", "resemblyzer", "wavlm", "whisper")
    assert TASKS.names() == ("continue", "speak", "transcribe", "translate")
    for registry in (SUITES, JUDGES, TASKS):
        for name in registry.names():
            assert registry[name].name == name
            assert name in registry
        assert "__init__" not in registry
        with pytest.raises(KeyError):
            registry["sing"]


def test_recipes_load_no_engine_and_members_neither():
    found = loaded("from megatron_soda.config import load_recipe; load_recipe(None)")
    assert "yaml" in found
    assert found.isdisjoint({*HEAVY, "numpy"})
    found = loaded(
        "from megatron_soda.registry import JUDGES, SUITES, TASKS\n"
        "for registry in (SUITES, JUDGES, TASKS): [registry[name] for name in registry.names()]"
    )
    assert "numpy" in found
    assert found.isdisjoint(HEAVY)


def test_a_file_is_a_member(monkeypatch, tmp_path):
    """No list of names has to change. A file named for a keyword of Python ends in an underscore."""
    (tmp_path / "class_.py").write_text(
        "from megatron_soda.inference.task import Task\n"
        "from megatron_soda.registry import TASKS\n"
        "@TASKS.register\n"
        "class Class(Task):\n"
        "    name = 'class'\n"
        "    def prompt(self, material): raise NotImplementedError\n"
    )
    import megatron_soda.inference.tasks as package

    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert TASKS.names() == ("class", "continue", "speak", "transcribe", "translate")
    assert "class" in load_recipe(None, ["generate.tasks=[class]"]).generate.tasks
    assert TASKS["class"].name == "class"
    del TASKS._members["class"]


@pytest.mark.parametrize(("command", "registry"), [("evaluate", SUITES), ("generate", TASKS)])
def test_the_help_names_every_member(command, registry):
    from typer.testing import CliRunner

    from megatron_soda.cli import app

    words = CliRunner().invoke(app, [command, "--help"]).output.replace(",", " ").replace(".", " ").split()
    assert set(registry.names()) <= set(words)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.suite=[grammer]", r"must be one of asr, continuation, gain, .*, twuggy\. Did you mean grammar\?"),
        ("generate.tasks=[talk]", "must be one of continue, speak, transcribe"),
    ],
)
def test_unknown_names(override, message):
    with pytest.raises(SodaError, match=message):
        load_recipe(None, [override])
