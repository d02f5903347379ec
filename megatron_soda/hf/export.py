"""`soda export`: a checkpoint as a stock Qwen3ForCausalLM folder, compared with our model before it is done.

    config.json, generation_config.json, model*.safetensors     what transformers and vLLM load
    tokenizer.json, tokenizer_config.json, text_tokenizer.*     the tokenizer, and its text part
    README.md, recipe.yaml                                      the model card; how it was trained
    codec/                                                      the codec of its audio tokens
    soda.json                                                   which checkpoint it comes from; hashes of the files

Tensors go from the checkpoint to the files one at a time.
"""

import hashlib
import json
import operator
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe, save_recipe
from ..console import console
from ..data.store import Store
from ..errors import SodaError
from ..files import read_json, read_sealed, reading, replace_folder, write_sealed
from ..parallel import ranks  # noqa: F401  before anything of megatron-core
from ..run_folder import record_timing
from ..tokenizer import NAMES, TextTokenizer, data_tokenizer
from ..training import checkpoint
from ..training.checkpoint_stream import TensorReader
from ..vocab import TokenSpace
from .card import CARD, model_card
from .compare import compare_logits, compare_tokenizer, example_documents
from .load import CODEC, CODEC_FILES, CONFIG, DESCRIPTION, IMPORTED, file_hashes, quiet_transformers, read_export
from .qwen3 import hf_config, our_shape, parts, shapes
from .tokenizer import compare_samples, save_tokenizer
from .weights import ShardWriter

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Source:
    """What an export is made from."""

    recipe: Recipe
    checkpoint: Path
    saved: Mapping[str, Any]  # checkpoint.json
    space: TokenSpace
    store: Store | None  # to compare with; an imported model may have no data
    beside: Path  # the folder with the tokenizer and the codec


def export(recipe: Recipe, folder: Path | None = None, to: Path | None = None, imported: Path | None = None) -> Path:
    """Writes the model `to` (RUN/hf) from the checkpoint `folder` (the newest) and returns it; skipped if it is there
    already, of the content of that checkpoint and whole. What is in `to` is replaced. imported: where the tokenizer and
    the codec of an imported model are (RUN/imported).

    Raises SodaError without a checkpoint, for one of another model, and if transformers' logits differ from ours.
    """
    began = time.monotonic()
    run = Path(recipe.run)
    if folder and (problems := checkpoint.damage(folder)):
        raise SodaError(f"{folder}: the checkpoint is damaged: {problems[0]}")
    newest = folder or checkpoint.newest_whole(run)
    if newest is None:
        raise SodaError(f"{run}: no checkpoint in it. Run `soda train` first.")
    final = to or run / "hf"
    with reading(newest / "checkpoint.json", "not the description of a checkpoint"):
        step = int(read_json(newest / "checkpoint.json")["step"])
    key = export_key(newest, recipe)
    beside = _beside(recipe, imported or run / IMPORTED)
    if _is_done(final, key, beside):
        console.print(f"{final}: step {step} is exported already, nothing to do")
        return final
    quiet_transformers()
    temporary = final.parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with console.status("exporting"):
            source = _source(recipe, newest, beside)
            difference = _write(source, key, temporary)
            replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"{final}: step {step}, largest logit difference to ours {difference:.1e}")
    record_timing(run, "export", {"seconds": time.monotonic() - began})
    return final


def export_key(folder: Path, recipe: Recipe) -> str:
    """Of the content of a checkpoint, not of its step, and of what the recipe says of the model."""
    parts = [recipe.name, asdict(recipe.model), recipe.data.sequence_length, recipe.export.weights]
    return hashlib.sha256(json.dumps([checkpoint.identity(folder), *parts]).encode()).hexdigest()[:16]


def _beside(recipe: Recipe, imported: Path) -> Path:
    there = (recipe.data_folder / "test.json").is_file() or not imported.is_dir()
    return recipe.data_folder if there else imported


def _source(recipe: Recipe, folder: Path, beside: Path) -> Source:
    """SodaError if the checkpoint is of another model than the recipe's, or the data were made by another codec or
    tokenizer than its own."""
    if beside == recipe.data_folder:
        store = Store(beside / "test")
        saved = checkpoint.read_description(folder, recipe.model, store.space)
        store.check_made_by(saved.get("made_by") or store.made_by, f"the model ({folder})", recipe.data.accept)
        return Source(recipe, folder, saved, store.space, store, beside)
    with reading(folder / "checkpoint.json", "not the description of a checkpoint"):
        space = TokenSpace(**read_json(folder / "checkpoint.json")["space"])
    saved = checkpoint.read_description(folder, recipe.model, space)
    known = {**saved.get("made_by", {}), **saved.get("imported", {})}.get("tokenizer")
    if (found := data_tokenizer(beside).fingerprint) != known:
        raise SodaError(
            f"{beside}: its tokenizer is {found}, that of the model ({folder}) is {known}. Import the model again."
        )
    return Source(recipe, folder, saved, space, None, beside)


def _write(source: Source, key: str, folder: Path) -> float:
    """Writes the whole model and returns the largest difference of a logit."""
    recipe, space, store = source.recipe, source.space, source.store
    text = data_tokenizer(source.beside)
    write_model(source, folder)
    tokenizer = save_tokenizer(text, space, folder, recipe.data.sequence_length)
    documents = example_documents(space)
    if store is not None:
        documents = [store.document(i) for i in range(min(len(documents), len(store)))]
        compare_tokenizer(folder, store, text)
    else:
        compare_samples(text, space, tokenizer, text.path)
    difference = compare_logits(recipe, space, source.checkpoint, folder, documents)
    _write_beside(source, text, key, folder)
    config = read_json(folder / "config.json")
    made_by = source.saved.get("made_by") or (store.made_by if store else {})
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != CARD]
    write_sealed(
        folder / DESCRIPTION,
        {
            "name": recipe.name,
            "step": source.saved["step"],
            "key": key,
            "space": space.to_dict(),
            "made_by": made_by,
            "max_logit_difference": difference,
            "config": {name: config[name] for name in CONFIG},
            "files": file_hashes(folder, names),
        },
    )
    for path in [folder, *folder.rglob("*")]:  # others may serve it, whatever the umask here
        path.chmod(0o755 if path.is_dir() else 0o644)
    return difference


def write_model(source: Source, folder: Path) -> None:
    """Weights and configuration. SodaError if the checkpoint does not hold the model that the recipe describes."""
    from transformers import GenerationConfig

    m, space = source.recipe.model, source.space
    reader, wanted = TensorReader(source.checkpoint), shapes(m, space.size)
    dtype = _FORMATS.get(source.recipe.export.weights) or _dtype(reader)
    writer = ShardWriter(folder, wanted, dtype)
    try:
        for part in parts(m):
            shape, found = our_shape(part, wanted), reader.shape(part.name, part.layer)
            rows_fit = operator.ge if part.kind == "vocabulary" else operator.eq  # a table is padded
            if found is None or found[1:] != shape[1:] or not rows_fit(found[:1], shape[:1]):
                raise SodaError(f"{source.checkpoint}: {part.name} is {found}, and should be {shape}")
            theirs = part.split(reader.read(part.name, part.layer), m, space.size)
            for name, tensor in zip(part.theirs, theirs, strict=True):
                writer.write(name, tensor)
    finally:
        writer.close()
    writer.finish()
    if left := reader.names() - {part.name for part in parts(m)}:
        raise SodaError(
            f"{source.checkpoint}: has tensors that a Qwen3 has no place for: {', '.join(sorted(left)[:5])}"
        )
    hf_config(m, space, source.recipe.data.sequence_length, dtype).save_pretrained(folder)
    ends = [space.eos, space.text_end, space.audio_end]
    GenerationConfig(bos_token_id=space.bos, eos_token_id=ends, pad_token_id=space.eos).save_pretrained(folder)


def _dtype(reader: TensorReader) -> torch.dtype:
    return torch.bfloat16 if {reader.dtype(name) for name in reader.names()} == {torch.bfloat16} else torch.float32


def _write_beside(source: Source, text: TextTokenizer, key: str, folder: Path) -> None:
    """Codec, text tokenizer, recipe and model card."""
    recipe = source.recipe
    for name in CODEC_FILES:
        if (source.beside / name).is_file():
            (folder / CODEC).mkdir(exist_ok=True)
            shutil.copyfile(source.beside / name, folder / CODEC / name)
    shutil.copyfile(text.path, folder / text.path.name)
    save_recipe(recipe, folder / "recipe.yaml")
    (folder / CARD).write_text(model_card(recipe, source.space, source.saved, _results(recipe, key)), encoding="utf-8")


def _results(recipe: Recipe, key: str) -> dict[str, Any]:
    """What RUN/eval.json says about this export; empty if it is about another."""
    path = Path(recipe.run) / "eval.json"
    try:
        found = read_json(path, dict) if path.is_file() else {}
    except SodaError:  # soda evaluate says so, and writes it again
        return {}
    return found if found.get("export") == key else {}


def _is_done(folder: Path, key: str, beside: Path) -> bool:
    """Whether `folder` is an export of this key, whole, with the codec and the tokenizer of the data folder."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        if read_sealed(folder / DESCRIPTION).get("key") == key:
            files = read_export(folder)["files"]
            now = {f"{CODEC}/{name}": entry for name, entry in file_hashes(beside, CODEC_FILES).items()}
            now |= file_hashes(beside, NAMES)
            others = [name for name, entry in now.items() if files.get(name) != entry]
            if not others:
                return True
            why = f"the data folder has another {Path(others[0]).name}"
        else:
            why = "it is of another checkpoint or recipe"
    except SodaError as error:
        why = str(error)
    console.note("exported again", f": {why}")
    return False
