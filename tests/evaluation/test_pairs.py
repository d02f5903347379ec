"""The likelihood suites: their figures against a loop over tokens, and models of known answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_soda.codecs import description
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import codes as encoding
from megatron_soda.evaluation import likelihood, panel
from megatron_soda.evaluation.bench import Bench
from megatron_soda.evaluation.pair_files import SALMON, Pair, Side
from megatron_soda.evaluation.pairs import accuracies
from megatron_soda.evaluation.run import evaluate
from megatron_soda.registry import SUITES
from megatron_soda.report import build_report
from tests.evaluation.pair_folders import LevelCodec, codes_of, flat, gold, hub, samples, text, wav
from tests.evaluation.toys import Toy

FIXED = ("mean", "sum", "semantic_mean", "semantic_sum")
SPOKEN = ("sblimp", "swuggy", "sstorycloze", "tstorycloze", "salmon")


@pytest.fixture
def benchmarks(exported, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(description, "_load", lambda *_: LevelCodec())
    LevelCodec.encoded = 0
    root = tmp_path / "benchmarks"
    gold(root / "sblimp", "sentences", 5)
    hub(root / "swuggy", "words", 12)
    flat(root / "sstorycloze", 5)
    flat(root / "tstorycloze", 5, "_", ("correct", "incorrect"))
    samples(root / "salmon", SALMON, 3)
    return root


def bench_of(exported, benchmarks: Path, *overrides: str) -> Bench:
    return Bench(exported.recipe(f"evaluate.benchmarks={benchmarks}", *overrides), exported.folder)


def prefers(space, parity: int):
    """Expects the codes of right recordings (parity 0) or of wrong ones, of every codebook."""

    def logits(ids: list[int]) -> np.ndarray:
        found, slot = np.zeros(space.size), (len(ids) - 2) % 4
        codes = space.audio_base + 16 * slot + np.arange(16)
        found[codes[(np.arange(16) - slot) % 2 == parity]] = 3.0
        return found

    return logits


@pytest.mark.parametrize(("parity", "expected"), [(0, 1.0), (1, 0.0)])
def test_a_model_that_knows_the_answers_is_always_right(exported, benchmarks, parity, expected):
    for name in SPOKEN:
        bench = bench_of(exported, benchmarks)
        bench.model.model, bench.model.key = Toy(exported.space, prefers(exported.space, parity)), f"parity {parity}"
        result = SUITES[name].measure(bench)
        for of_task in (result["all"], *result["tasks"].values()):
            figures = of_task["accuracies"]
            assert set(figures) >= {"paper", "mean", "semantic_mean", "semantic_sum"}
            # Sums also depend on the length, which is the same on both sides here.
            assert all(row == {"accuracy": expected, "low": expected, "high": expected} for row in figures.values())
        assert set(result["tasks"]) == {"salmon": set(SALMON), "sblimp": {"agreement", "islands"}}.get(name, set())


def test_a_model_that_finds_all_alike_is_wrong_by_the_papers_rule_and_right_half_of_the_time_by_ours(
    exported, benchmarks
):
    bench = bench_of(exported, benchmarks)
    bench.model.model, bench.model.key = Toy(exported.space, lambda ids: np.zeros(exported.space.size)), "flat"
    found = SUITES["salmon"].measure(bench)["all"]["accuracies"]
    assert {rule: row["accuracy"] for rule, row in found.items()} == {"paper": 0.0, **dict.fromkeys(FIXED, 0.5)}


def test_shuffled_labels_give_one_half_within_the_interval():
    rng = np.random.default_rng(0)
    nats = rng.normal(20, 4, (400, 2, 4)) + rng.normal(0, 9, (400, 1, 1))
    nats[:, 0] -= 3  # a model that is mostly right
    sound = Side(None)  # type: ignore[arg-type]
    pairs = [Pair(f"{i}", sound, sound) for i in range(400)]
    tokens = np.full((400, 2), 40)
    honest = accuracies(pairs, nats, tokens)["all"]["accuracies"]
    assert all(row["low"] > 0.6 for row in honest.values())
    shuffled = nats.copy()
    swap = rng.random(400) < 0.5
    shuffled[swap] = shuffled[swap][:, ::-1]
    for row in accuracies(pairs, shuffled, tokens)["all"]["accuracies"].values():
        assert row["low"] < 0.5 < row["high"]
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)  # of a fair coin


def test_pairs_of_one_group_weigh_as_one_item():
    sound = Side(None)  # type: ignore[arg-type]
    pairs = [Pair(name, sound, sound, group=name[0]) for name in ("a1", "a2", "a3", "b1")]
    nats = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])[..., None]
    found = accuracies(pairs, nats, np.full((4, 2), 5))["all"]["accuracies"]["paper"]
    assert found == {"accuracy": 0.5, "low": 0.0, "high": 1.0}  # a's three voices, and b's one


@torch.no_grad()
def nats_by_hand(bench: Bench, ids: list[int]) -> np.ndarray:
    logits = bench.model.model.double()(torch.tensor([ids[:-1]])).logits[0]
    bench.model.model.float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()[1:-1]


def test_figures_are_those_of_a_loop_over_tokens(exported, benchmarks):
    bench, s = bench_of(exported, benchmarks), exported.space
    suite = SUITES["swuggy"]
    result = suite.measure(bench)
    right: dict[str, list[float]] = {rule: [] for rule in ("paper", *FIXED)}
    first_two = []
    for number in range(12):
        scores = []
        for positive in (True, False):
            codes = (np.array(codes_of(number, positive))[:, None] + np.arange(4)) % 16
            ids = [s.bos, s.audio_start, *s.audio_ids(codes).tolist(), s.audio_end]
            nats = nats_by_hand(bench, ids).reshape(-1, 4)
            scores.append((nats.mean(), nats.sum(), nats[:, 0].mean(), nats[:, 0].sum(), nats[:, :2].mean()))
        right["paper"].append(scores[0][0] < scores[1][0])
        for rule, a, b in zip(FIXED, *scores, strict=False):
            right[rule].append(a < b)
        first_two.append(scores[0][4] < scores[1][4])
    for rule, values in right.items():
        assert result["all"]["accuracies"][rule]["accuracy"] == pytest.approx(np.mean(values)), rule
    assert result["first_codebooks"]["2"]["mean"] == pytest.approx(np.mean(first_two))
    assert 0 < np.mean(right["mean"]) < 1
    assert result["pairs"] == result["all"]["pairs"] == 12


def test_transcripts_are_scored_once_whatever_the_voices_and_lower_case_where_the_paper_did(exported, benchmarks):
    bench, s = bench_of(exported, benchmarks), exported.space
    for name, count, cased in (("tblimp", 5, str.lower), ("twuggy", 12, str)):
        result, right, sums = SUITES[name].measure(bench), [], []
        for number in range(count):
            both = [bench.model.text.encode(cased(text(number, of))) for of in (True, False)]
            sides = [nats_by_hand(bench, [s.bos, s.text_start, *ids, s.text_end]) for ids in both]
            right.append([sides[0].mean() < sides[1].mean(), sides[0].sum() < sides[1].sum()])
            sums += [side.sum() for side in sides]
        kept = (exported.run / "evaluate" / f"{name}.jsonl").read_text().splitlines()[1:]
        assert sorted(json.loads(line)[1][0] for line in kept) == pytest.approx(sorted(sums), abs=1e-4)
        found = result["all"]["accuracies"]
        assert set(found) == {"paper", "mean", "sum"}
        assert [found["paper"]["accuracy"], found["sum"]["accuracy"]] == pytest.approx(np.mean(right, axis=0))
        assert result["pairs"] == count
        assert "first_codebooks" not in result
    assert LevelCodec.encoded == 0


def test_transcripts_that_are_not_there(exported, benchmarks):
    next((benchmarks / "sblimp").rglob("gold.csv")).unlink()
    for path in (benchmarks / "sblimp" / "dev").iterdir():
        path.unlink()
    (benchmarks / "sblimp" / "dev").rmdir()
    (benchmarks / "sblimp").rmdir()
    flat(benchmarks / "sblimp", 3, "+")
    (benchmarks / "sblimp" / "2+x.txt").unlink()
    with pytest.raises(SodaError, match="sblimp: 1 pairs have no transcripts to score, the first is 2"):
        SUITES["tblimp"].check(bench_of(exported, benchmarks))


def test_a_suite_without_its_folder_is_refused_before_anything_is_measured(exported, benchmarks, monkeypatch):
    monkeypatch.setattr(type(SUITES["swuggy"]), "measure", lambda *_: pytest.fail("measured"))
    (benchmarks / "salmon").rename(benchmarks / "SALMon")
    suites = "suite=[swuggy,salmon]"
    with pytest.raises(SodaError, match=r"reads the folder salmon in it, which is not there"):
        evaluate(exported.recipe(suites, f"evaluate.benchmarks={benchmarks}"), exported.folder)
    with pytest.raises(SodaError, match=r"evaluate\.benchmarks=: .*, and it is not set"):
        evaluate(exported.recipe(suites), exported.folder)


def test_what_is_longer_than_the_context_is_left_out_named_and_counted(exported, benchmarks):
    folder = benchmarks / "sstorycloze"
    (folder / "3_x.wav").write_bytes(wav(3, False, 40))  # 160 tokens and three more; 161 fit
    (folder / "5_x.wav").write_bytes(wav(5, False, 39))
    result = SUITES["sstorycloze"].measure(bench_of(exported, benchmarks))
    assert result["longer_than_the_context"] == {"count": 1, "first": ["2_x"], "policy": "left out"}
    assert (result["pairs"], result["all"]["pairs"]) == (5, 4)
    for path in folder.glob("*.wav"):
        path.write_bytes(wav(3, True, 40))
    with pytest.raises(SodaError, match="all 5 pairs are longer than the model's context"):
        SUITES["sstorycloze"].measure(bench_of(exported, benchmarks))


def test_recordings_are_encoded_once(exported, benchmarks, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS_AT_ONCE", 0.5)
    whole = SUITES["swuggy"].measure(bench_of(exported, benchmarks))
    assert LevelCodec.encoded == 24
    folder = benchmarks / "codes" / "fake"
    parts = sorted(folder.iterdir())
    assert len(parts) > 3
    assert SUITES["swuggy"].measure(bench_of(exported, benchmarks)) == whole
    assert LevelCodec.encoded == 24
    parts[0].unlink()  # as if it had been interrupted before
    assert SUITES["swuggy"].measure(bench_of(exported, benchmarks)) == whole
    assert 24 < LevelCodec.encoded < 48
    monkeypatch.setattr(LevelCodec, "fingerprint", "another")
    bench = bench_of(exported, benchmarks)
    bench.codec = LevelCodec()
    before = LevelCodec.encoded
    SUITES["swuggy"].measure(bench)
    assert LevelCodec.encoded == before + 24
    monkeypatch.setattr(panel.os, "access", lambda *_: False)
    LevelCodec.fingerprint = "a third"
    SUITES["swuggy"].measure(bench)
    assert (exported.run / "evaluate" / "codes" / "a third").is_dir()


def test_a_recording_that_cannot_be_read_is_named(exported, benchmarks):
    path = benchmarks / "salmon" / "rir_consistency" / "sample_1_0.wav"
    path.write_bytes(b"not sound")
    with pytest.raises(SodaError, match=r"rir_consistency/sample_1_0\.wav: .* the benchmark is incomplete"):
        SUITES["salmon"].measure(bench_of(exported, benchmarks))


def test_the_same_whatever_the_batch(exported, benchmarks, monkeypatch):
    sums = []
    for run, tokens in (("a", 1), ("b", 100), ("c", 100_000)):
        monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", tokens)
        bench = bench_of(exported, benchmarks)
        bench.recipe.run = str(exported.run / run)
        SUITES["salmon"].measure(bench)
        lines = (exported.run / run / "evaluate" / "salmon.jsonl").read_text().splitlines()[1:]
        sums.append(dict(map(json.loads, lines)))
    assert len(sums[0]) > 5
    for other in sums[1:]:
        assert set(other) == set(sums[0])
        for digest, values in other.items():
            assert values == pytest.approx(sums[0][digest], abs=1e-5)


def test_the_command_and_the_page(exported, benchmarks, capsys):
    suites = f"suite=[{','.join(SPOKEN)},tblimp,twuggy,gain]"
    result = evaluate(exported.recipe(suites, f"evaluate.benchmarks={benchmarks}"), exported.folder)
    lines = capsys.readouterr().out.splitlines()
    assert next(line.split() for line in lines if line.startswith("swuggy")) == [
        "swuggy",
        "pairs",
        "value",
        "from",
        "to",
    ]
    row = result["swuggy"]["all"]["accuracies"]["paper"]
    shown = ["paper", "12", *(f"{row[key]:.4f}" for key in ("accuracy", "low", "high"))]
    assert shown in [line.split() for line in lines]
    assert result["salmon"]["made_with"]["torch"] == torch.__version__
    page = build_report(exported.run).read_text()
    for title in ("sWUGGY: words", "SALMon: acoustic consistency", "The link between text and sound"):
        assert title in page
    assert "rir consistency: paper" in page
    assert "sums" not in page
