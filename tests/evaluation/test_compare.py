"""`soda compare`: differences with paired intervals, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_soda import cli
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.compare import compare
from megatron_soda.evaluation.run import evaluate


def result(values: np.ndarray, **changes: Any) -> dict[str, Any]:
    """A result of one suite: (items,) and 1 as their counts."""
    items = {"names": [f"i{n}" for n in range(len(values))]}
    items["figures"] = {"paper": {"sums": values.tolist(), "counts": [1.0] * len(values)}}
    return {"items": items | changes, "must_match": {"scoring": "s", "data": "d"}}


def write(path: Path, **suites: Any) -> Path:
    path.write_text(json.dumps({"model": "m", **suites}))
    return path


def test_pairing_finds_what_two_intervals_apart_would_not(tmp_path):
    """Two models that differ on 12 of 400 items, all to the second's advantage."""
    rng = np.random.default_rng(0)
    one = (rng.random(400) < 0.6).astype(float)
    other = one.copy()
    other[np.flatnonzero(one == 0)[:12]] = 1
    first, second = write(tmp_path / "a", swuggy=result(one)), write(tmp_path / "b", swuggy=result(other))
    (found,), refused = compare(first, second)
    assert not refused
    assert (found.first, found.second) == pytest.approx((one.mean(), other.mean()))
    error = np.std(other - one) / 20  # of a mean of 400
    assert (found.low, found.high) == pytest.approx((0.03 - 1.96 * error, 0.03 + 1.96 * error), abs=0.004)
    assert found.low > 0
    assert 1.96 * np.sqrt(2) * one.std() / 20 > 0.06  # what the intervals of both would leave open
    (back,), _ = compare(second, first)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_tasks_and_groups(tmp_path):
    values = np.array([1.0, 1.0, 0.0, 0.0])
    facts = {"tasks": ["x", "x", "y", "y"], "groups": ["a", "a", "b", "c"]}
    first = write(tmp_path / "a", salmon=result(values, **facts))
    second = write(tmp_path / "b", salmon=result(1 - values, **facts))
    found, _ = compare(first, second)
    assert [(d.task, d.items, d.second - d.first) for d in found] == [("", 4, 0.0), ("x", 2, -1.0), ("y", 2, 1.0)]


def test_what_cannot_be_compared_is_said(tmp_path):
    values = np.ones(5)
    whole = {name: result(values) for name in ("swuggy", "sblimp", "salmon", "gain")}
    other = {**whole, "grammar": {"valid": 3}, "nll": result(values)}
    other["sblimp"] = {**result(values), "must_match": {"scoring": "s", "data": "other"}}
    other["salmon"] = result(np.ones(4))
    first, second = write(tmp_path / "a", **whole, grammar={"valid": 2}), write(tmp_path / "b", **other)
    found, refused = compare(first, second)
    assert {one.suite for one in found} == {"swuggy", "gain"}
    assert [line.split(": ")[0] for line in refused] == ["grammar", "nll", "salmon", "sblimp"]
    reasons = ("keeps none", f"{first} has no result; run", "1 items are in one result only, such as i4", "data is d")
    for line, said in zip(refused, reasons, strict=True):
        assert said in line
    (tmp_path / "c").write_text('{"swuggy": {"items": {}, "must_match": {}}}')
    with pytest.raises(SodaError, match=r"its part swuggy is damaged"):
        compare(tmp_path / "c", tmp_path / "c")
    with pytest.raises(SodaError, match="no suite has a result"):
        compare(write(tmp_path / "d"), write(tmp_path / "e"))


def test_the_command_on_results_of_evaluate(exported, tmp_path, monkeypatch, capsys):
    evaluate(exported.recipe("suite=[nll,grammar]", "evaluate.generations=2"), exported.folder)
    first = exported.run / "eval.json"
    changed = json.loads(first.read_text())
    sums = changed["nll"]["items"]["figures"]["semantic"]["sums"]
    changed["nll"]["items"]["figures"]["semantic"]["sums"] = [value * 0.9 for value in sums]
    second = tmp_path / "other.json"
    second.write_text(json.dumps(changed))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["soda", "compare", str(first), str(second)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["nll"] == ["nll", "items", "first", "second", "difference", "from", "to"]
    mean = changed["nll"]["classes"]["semantic"]["model_nats"]
    assert lines["semantic"][2:5] == [f"{mean:.4f}", f"{0.9 * mean:.4f}", f"{-0.1 * mean:.4f}"]
    assert float(lines["semantic"][5]) < -0.1 * mean < float(lines["semantic"][6]) < 0
    assert lines["text"][4:] == ["0.0000"] * 3
    assert "not compared:\n  grammar: the first result has no items" in error
