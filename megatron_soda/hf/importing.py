"""`soda import`: a Hugging Face Qwen3 as a checkpoint of step 0, which any layout reads.

A model with SODA's tokens is taken as it is. A text model is extended by the markers and the audio codes (a warm
start). RUN/imported gets the tokenizer and the codec, recipe.yaml the model's sizes.

Only JSON and safetensors are read, a tensor at a time; no code of the folder is run.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Model, Recipe, load_recipe, save_recipe
from ..config.model import PRESETS, SIZES
from ..console import console
from ..errors import SodaError
from ..files import locked, read_json, reading, write_text
from ..parallel import ranks  # noqa: F401  before anything of megatron-core
from ..run_folder import record_timing
from ..tokenizer import FAILED, NAMES, NEITHER, TextTokenizer, data_tokenizer, engine, read_spec
from ..training import checkpoint
from ..training.checkpoint_stream import written
from ..vocab import TokenSpace
from .load import CODEC, CODEC_FILES, DESCRIPTION, IMPORTED, file_hashes, quiet_transformers, read_export
from .qwen3 import EMBEDDING, HEAD, from_config, parts, shapes
from .tokenizer import compare_samples, extend_tokenizer, save_tokenizer, split_tokenizer
from .weights import Weights

LONGEST_WINDOW = 4096  # tokens: windows of a model with a longer context, unless the recipe says otherwise
Rows = Literal["means", "classes"]


@dataclass
class Arrival:
    """A checked folder, not yet imported."""

    folder: Path
    recipe: Recipe
    weights: Weights
    model: Model  # as in the folder; the recipe may untie its tables
    rows: int  # of its tables
    key: str


def import_model(
    folder: Path,
    overrides: list[str],
    shape: tuple[int, int] | None = None,
    rows: Rows = "means",
    run: Path | None = None,
) -> Path:
    """Makes RUN/checkpoints/step_00000000 of the model in `folder` and returns it; skipped if it is there already.

    overrides: `run=..` (unless `run` is given), and other settings of the recipe. shape: codebooks and entries of the
    audio tokens. rows: how new rows of a text model's tables start (`new_rows`). SodaError if the folder is not a whole
    Qwen3 with finite weights and a tokenizer that fits, or the run has other checkpoints.
    """
    began = time.monotonic()
    quiet_transformers()
    arrival = _look(folder, overrides, run, [list(shape) if shape else None, rows])
    run = Path(arrival.recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        final = checkpoint.folder_of(run, 0)
        if checkpoint.saved_steps(run):
            saved = read_json(final / "checkpoint.json") if final.is_dir() else {}
            if saved.get("imported", {}).get("key") == arrival.key and not checkpoint.damage(final):
                console.print(f"{final}: {folder} is imported already, nothing to do")
                return final
            raise SodaError(f"{run}: already has other checkpoints. Give another run folder: run=..")
        with console.status("importing"):
            text, space, known = _bring_tokenizer(arrival, run / IMPORTED, shape)
            save_recipe(arrival.recipe, run / "recipe.yaml")
            _write(arrival, final, text, space, known, rows)
    _tell(arrival, space, known, final)
    record_timing(run, "import", {"seconds": time.monotonic() - began})
    return final


def _look(folder: Path, overrides: list[str], run: Path | None, how: list[Any]) -> Arrival:
    """SodaError unless the folder is a whole Qwen3, judging by config.json and the headers of the weights."""
    if not (run or any(override.startswith("run=") for override in overrides)):
        raise SodaError("give a run folder: run=runs/NAME")
    if not (folder / "config.json").is_file():
        raise SodaError(f"{folder}: no config.json in it; give the folder of a Hugging Face model")
    settings, config = from_config(folder / "config.json")
    weights = Weights(folder)
    precision = "bf16" if weights.dtype == torch.bfloat16 else "fp32"
    defaults = [
        f"precision.dtype={precision}",
        f"data.sequence_length={min(config.max_position_embeddings, LONGEST_WINDOW)}",
    ]
    model = load_recipe(None, settings).model
    preset = next((name for name, (*sizes, _) in PRESETS.items() if sizes == [getattr(model, s) for s in SIZES]), None)
    values = {"name": folder.resolve().name, **({"run": str(run)} if run else {})}
    known = [f"model.preset={preset}"] if preset else []
    recipe = load_recipe(None, [*known, *settings, *defaults, *overrides], values)
    recipe.prepare.tokenizer = recipe.prepare.tokenizer or str(Path(recipe.run) / IMPORTED)
    ours = checkpoint.describe_model(recipe.model, TokenSpace(1, 0, 0))["model"]
    for name, value in checkpoint.describe_model(model, TokenSpace(1, 0, 0))["model"].items():
        if ours[name] != value and not (name == "tie_embeddings" and model.tie_embeddings):
            raise SodaError(f"model.{name}={ours[name]}: the model in {folder} has {value}. Leave it out.")
    wanted = shapes(model, config.vocab_size)
    both = bool(model.tie_embeddings) and HEAD in weights.shapes
    weights.check({**wanted, HEAD: wanted[EMBEDDING]} if both else wanted)
    if both and not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
        raise SodaError(f"{weights.files[HEAD]}: {HEAD} differs from {EMBEDDING}, and config.json says they are tied")
    files = file_hashes(folder, [p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")])
    key = hashlib.sha256(json.dumps([files, how, recipe.seed, ours]).encode()).hexdigest()[:16]
    return Arrival(folder, recipe, weights, model, config.vocab_size, key)


# ---- the tokenizer


def _bring_tokenizer(
    arrival: Arrival, home: Path, shape: tuple[int, int] | None
) -> tuple[TextTokenizer, TokenSpace, int]:
    """Writes the tokenizer, and the codec if there is one, into `home`. -> the text part, the token space, and how
    many ids the model already has."""
    shutil.rmtree(home, ignore_errors=True)
    source = arrival.folder
    path = source / "tokenizer.json"
    if not path.is_file():
        raise SodaError(f"{source}: no tokenizer.json in it; a fast tokenizer of transformers is needed")
    if (source / DESCRIPTION).is_file():
        text, space = _our_own(source, home)
        known = space.size
    elif found := split_tokenizer(path, shape):
        spec, space = found
        write_text(home / NAMES[1], json.dumps(spec, ensure_ascii=False))
        text, known = TextTokenizer(home / NAMES[1]), space.size
        if text.size != space.text_size:
            raise SodaError(f"{path}: its text ids must be 0 to {space.text_size - 1} without gaps")
    else:
        known = int(engine(read_spec(path), path).get_vocab_size(with_added_tokens=True))
        space = extend_tokenizer(source, home, *(shape or (8, 2048)))
        text = TextTokenizer(home)
    if known > arrival.rows:
        raise SodaError(f"{path}: has {known:,} tokens, and the model's tables have {arrival.rows:,} rows")
    if known == space.size:
        compare_samples(text, space, save_tokenizer(text, space, home, None), path)
        _compare_with(path, text, space)
    return text, space, known


def _our_own(source: Path, home: Path) -> tuple[TextTokenizer, TokenSpace]:
    """For a model that `soda export` wrote: copies its text tokenizer and codec, so that fingerprints stay the same."""
    space = read_export(source)["space"]
    text = data_tokenizer(source)
    home.mkdir(parents=True)
    shutil.copyfile(text.path, home / text.path.name)
    for name in CODEC_FILES:
        for place in (source / CODEC / name, source / name):
            if place.is_file() and not (home / name).exists():
                shutil.copyfile(place, home / name)
    return TextTokenizer(home), space


def _compare_with(path: Path, text: TextTokenizer, space: TokenSpace) -> None:
    """SodaError if a document has other ids in the model's own tokenizer than in ours."""
    from tokenizers import Tokenizer

    from ..tokenizer import document_string
    from .compare import example_documents
    from .tokenizer import SAMPLES, build_tokenizer, clean_text

    ours = build_tokenizer(text, space)
    with reading(path, NEITHER):
        theirs = Tokenizer.from_file(str(path))
        theirs.no_truncation()
        theirs.no_padding()
    (sound,) = (document_string(d[d > space.text_size + 1], space, text) for d in example_documents(space)[:1])
    for sample in SAMPLES:
        string = f"<|text_start|>{clean_text(sample, space)}<|text_end|>{sound}"
        with reading(path, FAILED):
            found, expected = (t.encode(string, add_special_tokens=False).ids for t in (theirs, ours))
        if found != expected:
            raise SodaError(f"{path}: {sample!r} has different ids inside a document and alone; it cannot be imported")


# ---- weights


def _write(arrival: Arrival, final: Path, text: TextTokenizer, space: TokenSpace, known: int, rows: Rows) -> None:
    from ..model.rows import padded_size

    m, weights, recipe = arrival.recipe.model, arrival.weights, arrival.recipe
    dtype, padded = weights.dtype, padded_size(space, 1)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with written(temporary) as writer:
            for part in parts(m):
                tied = part.theirs == (HEAD,) and arrival.model.tie_embeddings  # untied here: starts as a copy
                theirs = [weights.read(EMBEDDING if tied else name).to(dtype) for name in part.theirs]
                if part.kind == "vocabulary":
                    table = theirs[0][:known]
                    if known < space.size:
                        table = torch.cat([table, new_rows(table, space, rows, f"{recipe.seed}/{part.name}")])
                    theirs = [table]
                writer.write(part.name, part.join(theirs, m, padded), part.layer, m.num_layers)
            entries = writer.finish()
        checkpoint.seal(temporary, final, _description(arrival, text, space), entries)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_rows(table: Tensor, space: TokenSpace, how: Rows, seed: str) -> Tensor:
    """Rows (space.size - len(table), width) for the ids that a text model lacks.

    means: the mean of the existing rows. classes: drawn around it with their standard deviation, half of the variance
    shared by all rows of a class (markers, each codebook), so that slots of a frame differ from the start.
    """
    from ..model.gpt import generator_of

    old = table.float()
    mean, count = old.mean(0), space.size - len(old)
    if how == "means":
        return mean.expand(count, -1).to(table.dtype)
    spread = old.std(0) / 2**0.5
    draw = generator_of(seed)
    of_class = torch.randn(len(space.class_names), old.shape[1], generator=draw)
    own = torch.randn(count, old.shape[1], generator=draw)
    own += of_class[torch.from_numpy(space.class_table()[len(old) :]).long()]
    return own.mul_(spread).add_(mean).to(table.dtype)


def _description(arrival: Arrival, text: TextTokenizer, space: TokenSpace) -> dict[str, Any]:
    """checkpoint.json."""
    made_by = {"tokenizer": text.fingerprint}
    if (arrival.folder / DESCRIPTION).is_file():
        made_by = read_export(arrival.folder)["made_by"]
    return {
        **checkpoint.describe_model(arrival.recipe.model, space),
        "weights_only": True,
        "imported": {"name": arrival.folder.resolve().name, "key": arrival.key, "tokenizer": text.fingerprint},
        "made_by": made_by,
        **{"step": 0, "samples": 0, "tokens": 0, "branch": {}, "consumed": {}},
    }


def _tell(arrival: Arrival, space: TokenSpace, known: int, final: Path) -> None:
    said = [f"{space.size:,} ids"]
    if known < space.size:
        said.append(f"{space.size - known:,} of them new")
    if left := arrival.rows - known:
        said.append(f"{left:,} rows of its tables belong to no token and were left out")
    console.print(f"{final}: {arrival.folder}, {', '.join(said)}", highlight=False, soft_wrap=True)
