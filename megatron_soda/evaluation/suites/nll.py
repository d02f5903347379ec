"""The NLL vector of a model on held-out documents, compared with a smoothed per-slot unigram."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...files import atomic_path, reading
from ...registry import SUITES
from ..suite import Row, Suite

if TYPE_CHECKING:
    from ...data.store import Store
    from ...hf.load import LoadedModel
    from ..bench import Bench

NO_AUDIO = ("text", "marker")
TOTALS = {"acoustic_mean": "All acoustic", "all": "All tokens"}


@SUITES.register
class Nll(Suite):
    name = "nll"
    title = "Surprise per token, against the unigram baseline"
    about = (
        "The negative log-likelihood (NLL) is how surprised the model is by the true next token: lower is better, 0 "
        "would be perfect foresight. It is given in nats (natural logarithm) with bits below (1 nat = 1.443 bits; one "
        "bit less halves the guesses). The per-slot unigram ignores all context and only knows how often each token "
        "occurs in its place: what lies below it, the model has learned from context. A model trained with "
        "training.head_rows=legal chooses among the tokens that the grammar allows, as the unigram does; others choose "
        "among all tokens."
    )
    needs = ("data",)
    unit, small_unit, counted, against = "nats", "bits", "tokens", "unigram"
    glossary: ClassVar[tuple[str, str] | None] = (
        "What are these token classes?",
        "Text tokens spell the transcript. Markers say where text and sound begin and end. Sound itself is cut by the "
        "codec into short frames of several tokens each: the first, semantic, carries mostly what is said; acoustic 1, "
        "2, … add voice, timbre and room in ever finer steps, so the later ones are closer to noise and harder to "
        "predict. All are interleaved in one sequence, and one model predicts them all.",
    )
    absent = (
        "There is no likelihood evaluation yet: eval.json is missing or has no “nll” part. Evaluate the model and "
        "build this page again."
    )

    def measure(self, bench: "Bench") -> dict[str, Any]:
        test, train = bench.data
        documents, kept = bench.recipe.evaluate.documents, Path(bench.recipe.run) / "evaluate" / "nll.jsonl"
        counted = unigram(train) if bench.training is None else kept_unigram(train, bench.training / "evaluations")
        result = evaluate_nll(bench.model, test, train, documents, bench.softmax, kept=kept, baseline=counted)
        return result | {"head_rows": bench.recipe.training.head_rows} | self._rates(result, bench)

    def _rates(self, result: Mapping[str, Any], bench: "Bench") -> dict[str, float]:
        """Bits per second of audio, for all its tokens together, and per text token."""
        from ...codecs.description import read_description

        classes, side = result["classes"], "legal" if bench.softmax == "legal" else "model"
        found: dict[str, float] = {}
        if "semantic" in classes and bench.model.codec is not None:
            codec = read_description(bench.model.codec)
            seconds = classes["semantic"]["tokens"] * codec.samples_per_frame / codec.sample_rate
            bits = [row["tokens"] * row[f"{side}_bits"] for name, row in classes.items() if name not in NO_AUDIO]
            found["bits_per_audio_second"] = sum(bits) / seconds
        if "text" in classes:
            found["bits_per_text_token"] = classes["text"][f"{side}_bits"]
        return found

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        classes = result.get("classes")
        named = [
            *(classes.items() if isinstance(classes, dict) else ()),
            *((name, result.get(name)) for name in TOTALS),
        ]
        side = self._side(result)
        return [
            Row(
                name,
                row.get(f"{side}_nats"),
                label=TOTALS.get(name, ""),
                count=row.get("tokens"),
                baseline=row.get("unigram_nats"),
                small=(row.get(f"{side}_bits"), row.get("unigram_bits")),
                total=name in TOTALS,
            )
            for name, row in named
            if isinstance(row, dict)
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        classes = result.get("classes")
        named = {**(classes if isinstance(classes, dict) else {}), **{name: result.get(name) for name in TOTALS}}
        side = self._side(result)
        shown = ("tokens", f"{side}_nats", f"{side}_bits", "unigram_nats", "unigram_bits")
        more = {
            name: {key: value for key, value in row.items() if key not in shown}
            for name, row in named.items()
            if isinstance(row, dict)
        }
        shown = ("classes", "items", "must_match", *TOTALS)
        return more | {key: value for key, value in result.items() if key not in shown}

    @staticmethod
    def _side(result: Mapping[str, Any]) -> str:
        """Whose figures the table shows: those of the softmax that the model was trained with."""
        return "legal" if result.get("head_rows") == "legal" else "model"


def unigram(store: "Store") -> np.ndarray:
    """float64 (size,): -log p(token | its class) in nats, counted on `store`, one added to every count.

    It is given the class of the next token, which the model must predict itself.
    """
    counts = np.ones(store.space.size)
    for start in range(0, store.size, 1 << 24):
        chunk = store.read(start, min(1 << 24, store.size - start))
        counts += np.bincount(chunk, minlength=store.space.size)
    classes = store.space.class_table()
    totals = np.bincount(classes, weights=counts)
    return -np.log(counts / totals[classes])


def kept_unigram(store: "Store", folder: Path) -> np.ndarray:
    """The same, counted once: kept in `folder`. SodaError if what is there is damaged."""
    path = folder / f"unigram-{store.fingerprint}.npy"
    if not path.is_file():
        table = unigram(store)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        return table
    with reading(path, "not a table of token frequencies; remove it, and they are counted again"):
        table = np.load(path, allow_pickle=False)
        if table.shape != (store.space.size,) or table.dtype != np.float64:
            raise ValueError(f"{table.dtype} {table.shape}")
    return table


def evaluate_nll(
    model: "LoadedModel",
    test: "Store",
    train: "Store",
    documents: int = 0,
    softmax: str = "all",
    *,
    kept: Path,
    baseline: np.ndarray | None = None,
) -> dict[str, Any]:
    """Teacher-forced NLL of every token after BOS, for each document separately, truncated at the model's context
    length.

    documents: how many of `test` to use; 0: all. softmax: "all" or "legal", whose nats of single documents the result
    keeps for `soda compare`. kept: a file for the sums of every document, from which an interrupted evaluation goes on.
    baseline: `unigram(train)`, if it is known.
    Returns {"classes": {name: row}, "acoustic_mean": row, "all": row, ..}. A row has the
    number of tokens, and nats and bits: `model` of the softmax over all tokens, `legal` of the one over those that the
    grammar allows (model minus legal is -log of their share), and of the unigram.
    """
    from ..likelihood import context_of, digest_of

    names, longest = model.space.class_names, context_of(model)
    count = min(documents, len(test)) if documents else len(test)
    chosen = [test.document(i)[:longest] for i in range(count)]
    of_each = _sums(model, test.slots, chosen, unigram(train) if baseline is None else baseline, kept)
    sums = of_each.sum(0)
    rows = {name: _row(*sums[:, i]) for i, name in enumerate(names) if sums[0, i]}
    acoustic = [rows[name] for name in names[3:] if name in rows]
    result: dict[str, Any] = {"classes": rows, "all": _row(*sums.sum(1))}
    if acoustic:  # the mean over codebooks, as in the paper
        mean = {key: float(np.mean([row[key] for row in acoustic])) for key in acoustic[0]}
        result["acoustic_mean"] = mean | {"tokens": sum(row["tokens"] for row in acoustic)}
    chosen_nats = of_each[:, 1 + ("all", "legal").index(softmax)]
    must_match = {"tokens": model.made_by, "softmax": softmax, "data": digest_of(chosen)}
    return result | {"items": _items(names, of_each[:, 0], chosen_nats), "must_match": must_match}


def _sums(
    model: "LoadedModel", slots: int, documents: Sequence[np.ndarray], baseline: np.ndarray, path: Path
) -> np.ndarray:
    """float64 (documents, 4, classes): tokens; nats of the model, of the model among legal tokens, of the unigram."""
    from rich.progress import track

    from ...console import console
    from ..kept import Kept
    from ..likelihood import VERSION, Likelihood, batches, digest_of

    table, classes = model.space.class_table(), len(model.space.class_names)
    scorer, digests = Likelihood(model, slots), [digest_of([document]) for document in documents]

    def check(sums: Any) -> np.ndarray:
        return np.array(sums, float).reshape(2, classes)

    with Kept(path, [VERSION, model.key, slots], check) as kept:
        todo = list({digest: i for i, digest in enumerate(digests) if digest not in kept.values}.values())
        for batch in track(list(batches([len(documents[i]) for i in todo])), "evaluate", console=console):
            scored = [todo[i] for i in batch]
            for i, nats in zip(scored, scorer.nats([documents[i] for i in scored], ["all", "legal"]), strict=True):
                labels = table[documents[i][1:]]
                kept.add(digests[i], [np.bincount(labels, some, classes).tolist() for some in nats])
        of_each = np.zeros((len(documents), 4, classes))
        for sums, document, digest in zip(of_each, documents, digests, strict=True):
            labels = document[1:]
            sums[0] = np.bincount(table[labels], None, classes)
            sums[1:3] = kept.values[digest]
            sums[3] = np.bincount(table[labels], baseline[labels], classes)
    return of_each


def _items(names: list[str], tokens: np.ndarray, nats: np.ndarray) -> dict[str, Any]:
    """tokens, nats: (documents, classes) -> the sums of every document, by what is compared between models."""
    parts = {name: [i] for i, name in enumerate(names[:3])}
    parts |= {"acoustic": list(range(3, len(names))), "all": list(range(len(names)))}
    figures = {
        part: {"sums": nats[:, of].sum(1).tolist(), "counts": tokens[:, of].sum(1).tolist()}
        for part, of in parts.items()
        if tokens[:, of].any()
    }
    return {"names": [str(i) for i in range(len(tokens))], "figures": figures}


def _row(tokens: float, model: float, legal: float, baseline: float) -> dict[str, float]:
    nats = {"model": model / tokens, "legal": legal / tokens, "unigram": baseline / tokens}
    row: dict[str, float] = {"tokens": int(tokens)}
    for name, value in nats.items():
        row[f"{name}_nats"] = float(value)
        row[f"{name}_bits"] = float(value / math.log(2))
    return row
