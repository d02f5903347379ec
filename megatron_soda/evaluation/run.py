"""`soda evaluate`."""

import time
from pathlib import Path

from ..config import Recipe
from ..data.store import Store
from ..errors import SodaError
from ..files import read_json, write_json
from ..hf.load import load_model
from ..run_folder import record_timing


def evaluate(recipe: Recipe, folder: Path) -> dict:
    """Runs the recipe's suites on the exported model in `folder` and writes RUN/eval.json."""
    e, run = recipe.evaluate, Path(recipe.run)
    began = time.monotonic()
    model = load_model(folder)
    test, train = Store(recipe.data_folder / e.split), Store(recipe.data_folder / "train")
    for store in (test, train):
        store.check_space(model.space, str(folder))
        store.check_made_by(model.made_by, f"the model {folder}", recipe.data.accept)
        store.verify()  # or the figures would be those of the damage
    result: dict = {"model": model.name, "step": model.step, "split": e.split, "documents": e.documents or len(test)}
    result |= {"export": model.key, "data": [store.fingerprint for store in (test, train)]}
    path = run / "eval.json"
    before = _before(path)
    if all(before.get(key) == value for key, value in result.items()):
        result = before  # the other suites of the same model stay
    if "nll" in e.suite:
        from .nll import evaluate_nll

        result["nll"] = evaluate_nll(model, test, train, e.documents)
    if "grammar" in e.suite:
        from ..codecs.description import load_data_codec
        from .grammar import evaluate_grammar

        heard = test.slots == test.space.codebooks and (folder / "codec.json").is_file()  # else no sound can be made
        codec = load_data_codec(folder) if heard else None
        result["grammar"] = evaluate_grammar(model, codec, e.generations, e.max_tokens, recipe.seed, test.slots)
    write_json(path, result)
    record_timing(run, "evaluate", {"seconds": time.monotonic() - began})
    _print(result)
    return result


def _before(path: Path) -> dict:
    """What is there; damage is no reason to throw away what was just computed."""
    try:
        return read_json(path, dict) if path.is_file() else {}
    except SodaError as error:
        print(f"warning: {error}; it is rewritten")
        return {}


def _print(result: dict) -> None:
    if "nll" in result:
        nll = result["nll"]
        print(f"{'class':<14}{'tokens':>10}{'model':>9}{'unigram':>9}{'difference':>12}   nats")
        for name, row in [*nll["classes"].items(), ("acoustic mean", nll.get("acoustic_mean")), ("all", nll["all"])]:
            if row:
                m, u = row["model_nats"], row["unigram_nats"]
                print(f"{name:<14}{row['tokens']:>10,}{m:>9.3f}{u:>9.3f}{m - u:>12.3f}")
    if "grammar" in result:
        g = result["grammar"]
        print(
            f"{g['valid']} of {g['generations']} generations valid, "
            + (f"{g['duration_exact']} of exact duration, " if "duration_exact" in g else "")
            + f"{g['ended_by_itself']} ended by themselves; legal mass {g['legal_mass_mean']:.4f}. "
            f"Without the grammar: {g['free_valid']} valid, legal mass {g['free_legal_mass_mean']:.4f}"
        )
