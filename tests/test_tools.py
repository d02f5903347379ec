"""tools/: two runs are compared right, and what cannot be compared is said; the benchmarks start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def tool(name: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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

    done = tool("compare_runs.py", a, b, "--out", picture)
    assert done.returncode == 0, done.stderr
    assert "half written" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 40
    assert found["last_steps"] == [47, 50]
    assert found["loss"] == pytest.approx({"a": 9.515, "b": 9.715, "gap": 0.2})
    assert found["classes"]["text"]["gap"] == pytest.approx(0.3)
    assert found["classes"]["semantic"]["gap"] == pytest.approx(0.0)
    assert found["grad_norm"] == pytest.approx({"a": 1.0, "b": 1.2, "gap": 0.2})
    assert found["tokens_per_second"] == pytest.approx([1000.0, 1040.0])
    assert "+0.3000" in done.stdout
    assert "1.04 x" in done.stdout

    found = json.loads(tool("compare_runs.py", c, a).stdout.splitlines()[-1])
    assert found["largest_gap"] == pytest.approx({"step": 7, "gap": -1.2})
    assert found["last_steps"] == [37, 40]


@pytest.mark.parametrize(
    ("first", "words"),
    [("nothing", "no metrics.jsonl with losses"), ("early", "no logged step in common: steps 1 to 5, and 11 to 20")],
)
def test_compare_runs_refuses(tmp_path, first, words):
    write_run(tmp_path / "early", range(1, 6), 0.0)
    write_run(tmp_path / "late", range(11, 21), 0.0)
    done = tool("compare_runs.py", tmp_path / first, tmp_path / "late")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


BENCHMARKS = [str(path.relative_to(TOOLS)) for path in sorted((TOOLS / "bench").glob("bench_*.py"))]


@pytest.mark.parametrize("name", [*BENCHMARKS, "compare_runs.py"])
def test_help(name):
    done = tool(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "one JSON line" in done.stdout
