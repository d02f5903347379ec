"""`soda evaluate` from the registry: a new suite, what it needs, what stays in eval.json, what is refused."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_soda import cli
from megatron_soda.data.store import Store, write_store
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.run import evaluate, table
from megatron_soda.evaluation.suite import Row, Suite
from megatron_soda.registry import SUITES
from megatron_soda.report import build_report
from tests.exported import MADE_BY

QUICK = ("evaluate.documents=3", "evaluate.generations=2", "evaluate.max_tokens=20")


class Toy(Suite):
    name = "toy"
    title = "A toy measurement"
    about = "It only counts the parameters."
    against = "nothing"
    unit = "units"

    def measure(self, bench: Any) -> dict[str, Any]:
        return {"parameters": bench.model.model.num_parameters(), "guess": 100_000, "seed": bench.recipe.seed}

    def rows(self, result: Any) -> list[Row]:
        return [Row("parameters", result["parameters"], baseline=result["guess"], label="how many")]

    def rest(self, result: Any) -> dict[str, Any]:
        return {"seed of it": result["seed"]}


@pytest.fixture
def toy() -> Iterator[None]:
    SUITES.register(Toy)
    yield
    SUITES._members.pop("toy")


def test_a_registered_suite_is_run_printed_and_shown(exported, toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soda", "evaluate", str(exported.folder), "suite=[toy]", "seed=41"])
    cli.app(standalone_mode=False)
    result = json.loads((exported.run / "eval.json").read_text())
    count = result["toy"]["parameters"]
    assert count > 10_000
    assert result == {"model": "tiny", "step": 7, "export": "k", "toy": {**result["toy"], "guess": 100_000, "seed": 41}}
    heading, line = capsys.readouterr().out.splitlines()[:2]
    assert heading.split() == ["toy", "units", "nothing", "difference"]
    assert line.split() == ["parameters", f"{count:,}", "100,000", f"{count - 100_000:,}"]
    page = build_report(exported.run).read_text()
    for shown in ("A toy measurement", "It only counts", "how many", f'value="{float(count)}"', "seed of it", "41"):
        assert shown in page


def test_a_suite_without_data_needs_none(exported, toy):
    for path in (exported.run / "data").iterdir():
        path.unlink()
    assert evaluate(exported.recipe("suite=[toy]"), exported.folder)["toy"]["guess"] == 100_000
    with pytest.raises(SodaError, match=r"test\.json: no such file"):
        evaluate(exported.recipe("suite=[toy,nll]"), exported.folder)


def test_a_result_that_cannot_be_saved_is_printed(exported, toy, monkeypatch, capsys):
    """And a folder that cannot be written to is found out before anything is measured."""

    def full(path: Any, value: Any) -> None:
        raise SodaError("the disk is full")

    monkeypatch.setattr("megatron_soda.evaluation.run.write_json", full)
    with pytest.raises(SodaError, match="the disk is full"):
        evaluate(exported.recipe("suite=[toy]"), exported.folder)
    assert "100,000" in capsys.readouterr().out
    (exported.run / "a file").touch()
    with pytest.raises((NotADirectoryError, FileExistsError)):
        evaluate(exported.recipe("suite=[toy]", f"run={exported.run}/a file"), exported.folder)
    assert capsys.readouterr().out == ""


def test_what_a_suite_needs_is_missing_before_anything_is_measured(exported, toy, monkeypatch):
    monkeypatch.setattr(Toy, "needs", ("codec",))
    monkeypatch.setattr(Toy, "measure", lambda *_: pytest.fail("measured"))
    (exported.folder / "codec" / "codec.json").unlink()
    described = json.loads((exported.folder / "soda.json").read_text())
    from megatron_soda.files import write_sealed

    del described["files"]["codec/codec.json"]
    write_sealed(exported.folder / "soda.json", {k: v for k, v in described.items() if k != "crc32"})
    with pytest.raises(SodaError, match="no codec in it"):
        evaluate(exported.recipe("suite=[toy]"), exported.folder)
    assert not (exported.run / "eval.json").exists()


def test_default_suites_and_what_is_printed(exported, capsys):
    result = evaluate(exported.recipe(*QUICK), exported.folder)
    assert list(result) == ["model", "step", "split", "documents", "export", "data", "nll", "grammar"]
    assert result["documents"] == 3
    stores = [Store(exported.run / "data" / side) for side in ("test", "train")]
    assert result["data"] == [store.fingerprint for store in stores]
    assert json.loads((exported.run / "eval.json").read_text()) == result
    classes, each = result["nll"]["classes"], ("semantic", "acoustic_1", "acoustic_2", "acoustic_3")
    assert classes["text"]["tokens"] > 0
    a_frame = sum(classes[name]["model_bits"] for name in each)  # no document is cut inside one
    assert result["nll"]["bits_per_audio_second"] == pytest.approx(12.5 * a_frame)
    assert result["nll"]["bits_per_text_token"] == classes["text"]["model_bits"]
    assert json.loads((exported.run / "timings.json").read_text())["evaluate"]["seconds"] > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["nll", "tokens", "nats", "unigram", "difference"] in lines
    assert next(line for line in lines if line[:1] == ["all"])[1] == f"{result['nll']['all']['tokens']:,}"
    assert ["grammar", "value", "of"] in lines
    assert ["valid", "2", "2"] in lines
    assert ["audio", "spans", str(result["grammar"]["audio_spans"])] in lines


def test_other_suites_stay_while_model_and_data_are_the_same(exported, toy):
    whole = evaluate(exported.recipe(*QUICK), exported.folder)
    again = evaluate(exported.recipe("suite=[toy]"), exported.folder)
    assert again == {**whole, "toy": again["toy"]}
    kept = evaluate(exported.recipe(*QUICK, "suite=[grammar]"), exported.folder)
    assert kept["nll"] == whole["nll"]
    assert kept["grammar"] == whole["grammar"]  # the same seed
    other = evaluate(exported.recipe(*QUICK, "suite=[grammar]", "evaluate.documents=4"), exported.folder)
    assert set(other) >= {"grammar"}
    assert "nll" not in other
    path = exported.run / "eval.json"
    path.write_text(json.dumps({**whole, "export": "another model"}))
    assert "nll" not in evaluate(exported.recipe("suite=[toy]"), exported.folder)
    path.write_text('{"nll": {')
    assert "toy" in evaluate(exported.recipe("suite=[toy]"), exported.folder)


def test_data_that_are_not_the_models_are_refused(exported):
    store = Store(exported.run / "data" / "test")
    made = [store.document(i) for i in range(len(store))]
    write_store(store.path, made, store.space, **{**MADE_BY, "codec": "another"})
    with pytest.raises(SodaError, match=r"made by codec another, the model .* has codec fake"):
        evaluate(exported.recipe(*QUICK), exported.folder)
    evaluate(exported.recipe(*QUICK, "suite=[nll]", "data.accept=[codec]"), exported.folder)
    with store.path.with_suffix(".bin").open("r+b") as file:
        file.write(b"\7")
    with pytest.raises(SodaError, match=r"test\.bin: has changed since it was written"):
        evaluate(exported.recipe(*QUICK, "data.accept=[codec]"), exported.folder)


def test_shares_are_bars_on_the_page(exported, toy, monkeypatch):
    """A suite without a baseline, of a result that a damaged eval.json may hold."""
    monkeypatch.setattr(Toy, "against", "")
    monkeypatch.setattr(Toy, "counted", "pairs")
    rows = [Row("right", 0.625, of=1.0, count=48), Row("whole", 30, of=40), Row("odd", 7, of=5), Row("lost", "x")]
    monkeypatch.setattr(Toy, "rows", lambda *_: rows)
    path = exported.run / "eval.json"
    path.write_text('{"toy": {"seed": 1}}')
    page = build_report(exported.run).read_text()
    for shown in ("width:62.50%", "<small>48 pairs</small>", "width:75.00%", "<small>of 40</small>", ">odd</b>"):
        assert shown in page
    assert "of 5<" not in page
    assert ">lost</b>" not in page
    path.write_text('{"toy": {"other": 1}}')
    assert "its part “toy” is damaged and not shown (KeyError" in build_report(exported.run).read_text()


def test_columns_that_nothing_fills_are_left_out():
    class Plain(Toy):
        unit = ""

    assert len({len(line) for line in table(Plain(), [Row("another_speaker:_semantic_mean", 1)])[:2]}) == 1
    assert table(Plain(), [Row("word_error_rate", 0.12345)]) == [
        f"{'toy':<22}{'value':>12}",
        f"{'word error rate':<22}{'0.1235':>12}",
        "",
    ]
