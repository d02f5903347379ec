"""The report page, without a browser: what is on it, that it needs nothing else, and that nothing stops it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_soda.errors import SodaError
from megatron_soda.report import build_report
from megatron_soda.report.plots import running_mean
from megatron_soda.report.reading import read_metrics
from megatron_soda.report.samples import compared
from megatron_soda.report.words import big, span

PAPER = "https://arxiv.org/abs/2602.16687"
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """What a page refers to, shows and nests."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.figures: set[str] = set()  # the exact values of all <data> elements
        self.tags: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data"):
                self.references.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if tag == "data" and name == "value":
                self.figures.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def build(run: Path) -> Page:
    path = build_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    assert len(page.ids) == len(set(page.ids)), "ids are unique, also across the charts"
    return page


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [found for part in value.values() for found in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_refers_to_nothing_outside(fake_run: Path) -> None:
    page = build(fake_run)
    outside = [ref for ref in page.references if not ref[2].startswith(("data:", "#"))]
    assert outside == [("a", "href", PAPER)]
    for _, _, target in page.references:
        assert not target.startswith("#") or target[1:] in page.ids
    html = re.sub(r"data:[^\"]+", "", (fake_run / "report.html").read_text(encoding="utf-8"))
    assert re.findall(r"(?:https?:|file:|//)[\w/.-]+", html.replace(PAPER, "")) == []
    assert re.findall(r"url\((?!#)|@import|<iframe|<object|<embed", html) == []
    assert str(fake_run) not in html


def test_every_number_of_the_evaluation_is_shown(fake_run: Path) -> None:
    page = build(fake_run)
    evaluation = json.loads((fake_run / "eval.json").read_text())
    found = numbers(evaluation)
    assert len(found) > 60
    assert [value for value in found if json.dumps(value) not in page.figures] == []
    row = evaluation["nll"]["classes"]["semantic"]
    for shown in (f"{row['model_nats']:.3f}", f"{row['unigram_bits']:.3f}", "48,211", "113,246,208", "0.9973", "2,417"):
        assert shown in page.text
    assert "Beats the per-slot unigram baseline on every class of token" in page.text


def test_every_piece_is_there(fake_run: Path) -> None:
    page = build(fake_run)
    assert page.tags.count("audio") == page.tags.count("img") == 9
    assert page.tags.count("svg") == 2 * 2 + 10 + 3
    for shown in (
        "113 M parameters",
        "131 M training tokens",
        "every audio span decodes to exactly its number of frames",
        "acoustic 7",
        "shorter than 0.5 s",
        "megatron core",
        "fit codec",
        "12 min 4 s",
    ):
        assert shown in page.text
    for shown in (
        "batch_tokens: 65536",
        "Recordings made up",
        "arXiv 2602.16687",
        "1.6 seconds of prompt",
        "demo-codec",
    ):
        assert shown in page.text
    assert "missing" not in page.text


def test_html_in_texts_is_text(fake_run: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    samples = json.loads((fake_run / "samples/samples.json").read_text())
    for sample in samples:
        sample |= {"prompt_text": evil, "reference_text": f"so {evil}", "output_text": evil, "note": evil, "id": evil}
        sample["language"] = '"><script>alert(1)</script>'
    (fake_run / "samples/samples.json").write_text(json.dumps(samples))
    (fake_run / "recipe.yaml").write_text(f"name: demo # {evil}\n</pre>{evil}")
    (fake_run / "environment.json").write_text(json.dumps({evil: evil, "nested": {evil: [evil]}}))
    (fake_run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "nll": {evil: 2.0, "$x_": 1.0}}))
    page = build(fake_run)
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == page.tags.count("audio")
    assert evil in page.text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("metrics.jsonl", "There are no training metrics yet"),
        ("eval.json", "There is no likelihood evaluation yet"),
        ("samples", "There are no samples yet"),
        ("environment.json", "Nothing is known about the environment"),
        ("timings.json", "There are no timings"),
        ("data/prepare.json", "There is no data summary"),
        ("recipe.yaml", "There is no recipe.yaml"),
    ],
)
def test_a_missing_piece_is_named(fake_run: Path, name: str, says: str) -> None:
    if name not in ("metrics.jsonl", "samples"):  # neither matters here, and both take their time
        (fake_run / "metrics.jsonl").unlink()
        shutil.rmtree(fake_run / "samples")
    path = fake_run / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert says in build(fake_run).text


@pytest.mark.parametrize("name", ["eval.json", "samples/samples.json", "environment.json", "timings.json"])
@pytest.mark.parametrize("content", ['{"nll": {"cl', "[]", "3", "null", '{"a": [1, {"b": null}], "c": NaN}', "\udcff"])
def test_a_damaged_piece_does_not_stop_the_page(quick_run: Path, name: str, content: str) -> None:
    (quick_run / name).write_text(content, errors="surrogateescape")
    page = build(quick_run)
    assert (f"{name} could not be read" in page.text) == (content in ('{"nll": {"cl', "\udcff"))


def test_odd_values_do_not_stop_the_page(quick_run: Path) -> None:
    nll = {
        "classes": {"text": {"model_nats": "?", "tokens": None}, "semantic": 3, "voice": {"model_nats": 1.5}},
        "all": 7,
    }
    grammar = {"generations": 0, "valid": 3, "free_legal_mass_mean": None, "list": [1, 2], "deep": {"er": {"x": 0.25}}}
    (quick_run / "eval.json").write_text(json.dumps({"model": None, "nll": nll, "grammar": grammar}))
    prepared = {"rejects": ["gone", {"where": 3}], "languages": {"en": 4}, "tokens": {"train": 5}, "codec": "name only"}
    (quick_run / "data/prepare.json").write_text(json.dumps(prepared))
    (quick_run / "timings.json").write_text(json.dumps({"a": 3, "b": {"x": "soon", "y": 2.0}, "c": {}}))
    page = build(quick_run)
    for shown in ("voice", "1.500", "deep › er › x", "0.25", "gone", "name only", "soon", "Left out: 2"):
        assert shown in page.text


def test_only_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: just-begun\n")
    page = build(tmp_path)
    assert "just-begun" in page.text
    assert "Not trained yet" in page.text


def test_empty_metrics(fake_run: Path) -> None:
    (fake_run / "metrics.jsonl").write_text("")
    assert "There are no training metrics yet" in build(fake_run).text


def test_half_written_last_line(fake_run: Path) -> None:
    path = fake_run / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    page = build(fake_run)
    assert "The last line of metrics.jsonl is half written" in page.text
    assert page.tags.count("svg") == 2 * 2 + 10 + 3


def test_only_a_half_line(fake_run: Path) -> None:
    (fake_run / "metrics.jsonl").write_text('{"step": 1, "lo')
    text = build(fake_run).text
    assert "half written" in text
    assert "There are no training metrics yet" in text


def test_a_resumed_run_counts_every_step_once_and_lost_losses_are_named(fake_run: Path) -> None:
    first = [{"step": step, "tokens": step * 100, "loss": 9.0} for step in (1, 2, 3)]
    again = [{"step": step, "tokens": step * 100, "loss": 5.0 if step < 4 else float("nan")} for step in (3, 4)]
    (fake_run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*first, *again])) + "\nnot json\n{}\n")
    text = build(fake_run).text
    assert "from 9.000" in text
    assert "5.000" in text
    assert "2 unreadable lines left out, first line 6" in text
    assert "not a finite number at 1 step, first at 4" in text
    assert "No validation loss has been measured yet" in text


def test_mixed_and_bad_verdicts(quick_run: Path) -> None:
    evaluation = json.loads((quick_run / "eval.json").read_text())
    classes = evaluation["nll"]["classes"]
    classes["text"]["model_nats"] = classes["text"]["unigram_nats"] + 0.5
    (quick_run / "eval.json").write_text(json.dumps(evaluation))
    text = build(quick_run).text
    assert "on 9 of 10 classes of token; not on text" in text
    assert "+0.500" in text
    for row in classes.values():
        row["model_nats"] = row["unigram_nats"] + 1
    (quick_run / "eval.json").write_text(json.dumps(evaluation))
    assert "Does not beat the per-slot unigram baseline on any class" in build(quick_run).text


def test_a_model_trained_over_legal_rows_is_shown_by_its_own_softmax(quick_run: Path) -> None:
    evaluation = json.loads((quick_run / "eval.json").read_text())
    for row in evaluation["nll"]["classes"].values():
        row["legal_nats"], row["legal_bits"] = row["unigram_nats"] - 0.625, 1.0
    (quick_run / "eval.json").write_text(json.dumps(evaluation))
    assert "−0.625" not in build(quick_run).text
    evaluation["nll"]["head_rows"] = "legal"
    (quick_run / "eval.json").write_text(json.dumps(evaluation))
    assert build(quick_run).text.count("−0.625") == len(evaluation["nll"]["classes"])


def test_sounds_that_cannot_be_shown_are_named(fake_run: Path) -> None:
    folder = fake_run / "samples"
    (folder / "broken.wav").write_bytes(b"RIFFnothing")
    (fake_run / "secret.wav").write_bytes((folder / "1.wav").read_bytes())
    audio = {"original": "gone.wav", "codec": "broken.wav", "prompt": "../secret.wav", "another voice": "1.wav"}
    (folder / "samples.json").write_text(json.dumps([{"task": "sing", "id": "a", "audio": audio}, "no sample", {}]))
    page = build(fake_run)
    assert page.tags.count("audio") == 1
    for shown in (
        "gone.wav is missing",
        "broken.wav could not be read as a sound file",
        "outside the samples folder",
        "Another voice",
    ):
        assert shown in page.text


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SodaError, match="no such folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(SodaError, match="not a run folder"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_are_compared() -> None:
    reference, output, agreement = compared("One two, three.", "one too three")
    assert reference == [("same", "One "), ("differs", "two,"), ("same", " "), ("same", "three.")]
    assert output == [("same", "one "), ("differs", "too"), ("same", " "), ("same", "three")]
    assert agreement.startswith("2 of 3 words")
    assert compared("北风和太阳", "北风太阳")[2].startswith("4 of 5 characters")


def test_lengths_of_time() -> None:
    assert [span(value) for value in (0.25, 4.94, 93.1, 5400, 200000)] == [
        "0.25 s",
        "4.9 s",
        "1 min 33 s",
        "1 h 30 min",
        "2 d 8 h",
    ]


def test_large_numbers_are_shortened() -> None:
    assert [big(value) for value in (2576, 65536, 1234567, 131e6)] == ["2,576", "65.5 k", "1.23 M", "131 M"]
    assert [big(value, digits=2) for value in (4_912_384, 113_246_208, 4e9)] == ["4.9 M", "113 M", "4.0 B"]


def test_speed_is_in_whole_tokens(quick_run: Path) -> None:
    (quick_run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 2.5, "tokens_per_second": 2576.4}\n')
    text = build(quick_run).text
    assert "2,576 /s" in text
    assert "2,576.4" not in text


def test_running_mean_keeps_a_constant() -> None:
    assert running_mean(np.full(50, 3.0), 9) == pytest.approx(np.full(50, 3.0))


def test_results_of_another_export_are_flagged(quick_run):
    (quick_run / "hf").mkdir(exist_ok=True)
    (quick_run / "hf" / "soda.json").write_text(json.dumps({"key": "new"}))
    evaluated = json.loads((quick_run / "eval.json").read_text())
    for key in ("new", "old"):
        (quick_run / "eval.json").write_text(json.dumps(evaluated | {"export": key}))
        (quick_run / "samples").mkdir(exist_ok=True)
        (quick_run / "samples" / "samples.json").write_text(json.dumps([{"task": "speak", "export": key, "audio": {}}]))
        page = build_report(quick_run).read_text()
        assert ("run soda evaluate again" in page) == (key == "old")
        assert ("run soda generate again" in page) == (key == "old")


def test_what_was_evaluated_while_training_is_drawn(fake_run: Path) -> None:
    before, metrics = build(fake_run), fake_run / "metrics.jsonl"
    assert "Evaluated while training" not in before.text
    with metrics.open("a") as file:
        for step, gain in ((200, 0.01), (400, 0.03)):
            figures = {"gain_text_given_audio": gain, "grammar_valid": 7, "grammar_lost": None}
            file.write(json.dumps({"step": step, "evaluation": figures}) + "\n")
    page = build(fake_run)
    assert page.tags.count("svg") == before.tags.count("svg") + 2
    assert "gain text given audio" in page.text
    assert "gain text given audio: from 0.01 to 0.03" in (fake_run / "report.html").read_text()
    train, valid, evaluated = read_metrics(metrics, [])
    assert [point["step"] for point in evaluated] == [200, 400]
    assert {200, 400} <= {point["step"] for point in train if "loss" in point}
    assert len(valid) == 10
