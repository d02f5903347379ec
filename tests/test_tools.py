"""tools/: two runs are compared right, and what cannot be compared is said; the benchmarks start."""

import json
from pathlib import Path

import pytest

from tests.forked import forked
from tests.helpers import TOOLS, run_tool


def write_run(folder: Path, steps: range, gap: float, extra: str = "") -> Path:
    """Losses 10 - step / 100 + gap; text half a gap higher, semantic a gap lower. Validation lines do not count."""
    folder.mkdir()
    lines = []
    for step in steps:
        loss = 10 - step / 100 + gap + (1.0 if gap and step == 7 else 0.0)
        nll = {"text": loss + gap / 2, "semantic": loss - gap}
        speed = 5.0 if step == steps[0] else 1000.0 + 200 * gap
        point = {"step": step, "loss": loss, "grad_norm": 1 + gap, "tokens_per_second": speed, "nll": nll}
        lines += [json.dumps(point), json.dumps({"step": step, "valid_loss": 0.0, "valid_nll": {}})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + extra + "\n")
    return folder


def test_compare_runs(tmp_path):
    a = write_run(tmp_path / "a", range(1, 51), 0.0)
    b = write_run(tmp_path / "b", range(11, 81), 0.2, '\n{"step": 81, "lo')
    c = write_run(tmp_path / "c", range(1, 41), 0.2)
    picture = tmp_path / "gap.png"

    status, said, warned = forked(run_tool, "compare_runs.py", a, b, "--out", picture)
    assert status == 0, warned
    assert "half written" in warned
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(said.splitlines()[-1])
    assert found["steps"] == 40
    assert found["last_steps"] == [47, 50]
    assert found["loss"] == pytest.approx({"a": 9.515, "b": 9.715, "gap": 0.2})
    assert found["classes"]["text"]["gap"] == pytest.approx(0.3)
    assert found["classes"]["semantic"]["gap"] == pytest.approx(0.0)
    assert found["grad_norm"] == pytest.approx({"a": 1.0, "b": 1.2, "gap": 0.2})
    assert found["tokens_per_second"] == pytest.approx([1000.0, 1040.0])
    assert "+0.3000" in said
    assert "1.04 x" in said

    found = json.loads(forked(run_tool, "compare_runs.py", c, a)[1].splitlines()[-1])
    assert found["largest_gap"] == pytest.approx({"step": 7, "gap": -1.2})
    assert found["last_steps"] == [37, 40]


@pytest.mark.parametrize(
    ("first", "words"),
    [("nothing", "no metrics.jsonl with losses"), ("early", "no logged step in common: steps 1 to 5, and 11 to 20")],
)
def test_compare_runs_refuses(tmp_path, first, words):
    write_run(tmp_path / "early", range(1, 6), 0.0)
    write_run(tmp_path / "late", range(11, 21), 0.0)
    status, _, said = forked(run_tool, "compare_runs.py", tmp_path / first, tmp_path / "late")
    assert status == 2
    assert words in said
    assert "Traceback" not in said


BENCHMARKS = [str(path.relative_to(TOOLS)) for path in sorted((TOOLS / "bench").glob("bench_*.py"))]


@pytest.mark.parametrize("name", [*BENCHMARKS, "compare_runs.py"])
def test_help(name):
    status, said, warned = forked(run_tool, name, "--help")
    assert status == 0, warned
    assert "one JSON line" in said
