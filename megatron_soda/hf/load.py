"""A model to use: an exported folder, with its token space, tokenizer and codec."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..codecs import QUANTISER_FILE
from ..codecs.description import DESCRIPTION as CODEC_DESCRIPTION
from ..config import load_recipe
from ..errors import SodaError
from ..files import read_json, read_sealed, reading, sha256
from ..tokenizer import TextTokenizer, data_tokenizer
from ..vocab import TokenSpace
from .qwen3 import EMBEDDING, HEAD, from_config, hf_config, shapes
from .weights import Weights

DESCRIPTION = "soda.json"
IMPORTED = "imported"  # in a run folder: tokenizer and codec of an imported model
CODEC = "codec"  # folder: beside the model's own, vLLM would take the codec's safetensors for some of them
CODEC_FILES = (CODEC_DESCRIPTION, QUANTISER_FILE)
CONFIG = (  # what of config.json makes another model of the same weights, or none
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "use_sliding_window", "max_position_embeddings", "bos_token_id", "eos_token_id"),
)


@dataclass
class LoadedModel:
    folder: Path
    name: str
    step: int
    key: str  # of what it was exported from (export.export_key)
    model: Any  # transformers' Qwen3ForCausalLM, in eval mode
    space: TokenSpace
    made_by: dict[str, str]  # fingerprints of the codec and the tokenizer of its ids
    text: TextTokenizer
    device: torch.device

    @property
    def codec(self) -> Path | None:
        """The folder that describes the codec of its audio tokens; None if it knows no sound. Earlier versions wrote
        the codec beside the model."""
        places = (self.folder / CODEC, self.folder)
        return next((place for place in places if (place / CODEC_DESCRIPTION).is_file()), None)


def quiet_transformers() -> None:
    """Errors only, and no progress bars of its own: it warns of a context shorter than Llama-3's, which is meant."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """Bytes and SHA-256 of those of the files that are there, by their paths in the folder."""
    paths = {name: folder / name for name in sorted(names)}
    return {name: [path.stat().st_size, sha256(path)] for name, path in paths.items() if path.is_file()}


def read_export(folder: Path) -> dict[str, Any]:
    """soda.json: name, step, key, space, and what else `soda export` says of a model. SodaError, naming the file, if
    one is not as it was exported: then weights, ids or the model's sizes would be others than it says."""
    path = folder / DESCRIPTION
    described = read_sealed(path)
    again = "Export the run again (soda export RUN)."
    if "files" not in described or "config" not in described or "crc32" not in described:
        raise SodaError(f"{path}: was not written by this version: its files cannot be checked. {again}")
    with reading(path, "not the description of a model that soda exported"):
        described["space"] = TokenSpace(**described["space"])
        described["name"], described["step"] = str(described["name"]), int(described["step"])
        files = {_inside(name): (int(size), str(digest)) for name, (size, digest) in described["files"].items()}
        sizes, described["made_by"] = dict(described["config"]), dict(described["made_by"])
    config = read_json(folder / "config.json", dict)
    for name, value in sizes.items():
        if config.get(name) != value:
            raise SodaError(
                f"{folder / 'config.json'}: {name} is {config.get(name)!r}, the exported model has {value!r}. {again}"
            )
    for name, (size, digest) in files.items():
        with reading(folder / name):
            found = (folder / name).stat().st_size
            same = found == size and sha256(folder / name) == digest
        if not same:
            what = f"{found} bytes, not {size}" if found != size else "other bytes than were exported"
            raise SodaError(f"{folder / name}: has {what}. {again}")
    return described


def _inside(name: str) -> str:
    """ValueError for a path that leads out of the folder it is relative to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is no file of this folder")
    return name


def load_model(folder: Path) -> LoadedModel:
    """Raises SodaError if `folder` is not a model that `soda export` wrote, or not as it was written."""
    quiet_transformers()
    described = read_export(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(folder, described["space"]).to(device)
    if device.type == "cpu" and model.num_parameters() < 100e6:
        torch.set_num_threads(1)  # a token at a time, threads cost such a model more than they give
    name, step, key, space, made_by = (described[part] for part in ("name", "step", "key", "space", "made_by"))
    return LoadedModel(folder, name, step, key, model, space, made_by, data_tokenizer(folder), device)


def read_model(folder: Path, space: TokenSpace) -> Any:
    """The Qwen3ForCausalLM in `folder`, in eval mode.

    transformers' own from_pretrained follows whatever a folder says: code to run, adapters and weights from elsewhere,
    random values for missing tensors. Here only the sizes in config.json and safetensors are read, and SodaError names
    what is missing, unknown, of another shape or not finite.
    """
    from transformers import Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    settings, theirs = from_config(folder / "config.json")
    shape, weights = load_recipe(None, settings).model, Weights(folder)
    weights.check(shapes(shape, space.size))
    config = hf_config(shape, space, theirs.max_position_embeddings, weights.dtype)
    with reading(folder, "cannot load the model"):
        with torch.device("meta"):
            model: Any = Qwen3ForCausalLM(config)
        model.model.rotary_emb = Qwen3RotaryEmbedding(config)  # computed, not loaded
        tensors = {name: weights.read(name).to(weights.dtype) for name in weights.shapes}
        model.load_state_dict({HEAD: tensors[EMBEDDING], **tensors}, assign=True)
        if config.tie_word_embeddings:
            model.tie_weights()
    return model.eval()
