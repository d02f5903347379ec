"""codec.json: the codec behind the tokens of a data folder or a model, and how to load it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import SodaError
from ..files import read_json, reading
from . import DEFAULT_MODELS, QUANTISER_FILE, load_codec
from .base import Codec

DESCRIPTION = "codec.json"
_ARGUMENTS = {"spec": str, "path": (str, type(None)), "codebooks": (int, type(None))}  # of load_codec
_COUNTS = ("codebooks", "entries")
_RATES = ("sample_rate", "samples_per_frame")


@dataclass(frozen=True)
class CodecDescription:
    name: str
    fingerprint: str
    codebooks: int
    entries: int
    sample_rate: int  # Hz
    samples_per_frame: int
    arguments: dict[str, Any]  # of load_codec

    @classmethod
    def of(cls, codec: Codec, arguments: dict[str, Any]) -> Self:
        """Describes the codec that these arguments load."""
        facts = {name: getattr(codec, name) for name in ("name", "fingerprint", *_COUNTS, *_RATES)}
        return cls(**facts, arguments=arguments)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError unless `values` describes a codec."""
        for name in (*_COUNTS, *_RATES):
            value = values[name]
            if type(value) is not int or value < 1 or (name in _COUNTS and value > 1 << 16):
                raise ValueError(f"{name} is {value!r}")
        for name, kind in {"name": str, "fingerprint": str, "arguments": dict}.items():
            if not isinstance(values[name], kind):
                raise TypeError(f"{name} is {values[name]!r}")
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_description(folder: Path) -> CodecDescription:
    """Raises SodaError if the folder has no codec.json, or a damaged one."""
    values = read_json(folder / DESCRIPTION, dict)
    with reading(folder / DESCRIPTION, "does not describe a codec"):
        return CodecDescription.from_dict(values)


def load_data_codec(folder: Path, device: str = "cpu") -> Codec:
    """The codec that made the tokens of a data folder, or of an exported model, which has its own copy. device: a torch
    device to run it on.

    Raises SodaError if it cannot be loaded, or if the installed version would give different codes."""
    described = read_description(folder)
    arguments, fitted, codec = described.arguments, folder / QUANTISER_FILE, None
    if fitted.is_file() and arguments.get("path", "") and described.name == "embedded":
        arguments = {**arguments, "path": str(fitted)}
        codec = _load(arguments, folder)
    if codec is None or codec.fingerprint != described.fingerprint:  # the fitted one is left over from another run
        arguments = described.arguments
        codec = _load(arguments, folder)
    if codec.fingerprint != described.fingerprint:
        raise SodaError(
            f"{folder}: its tokens were made by codec {described.fingerprint}, but the installed one is "
            f"{codec.fingerprint}. Prepare the data again, or install the version of megatron_soda that made it."
        )
    # The fingerprint in a description is that on the CPU, wherever the data were encoded.
    return codec if device == "cpu" else _load(arguments, folder, device)


def _load(arguments: dict[str, Any], folder: Path, device: str = "cpu") -> Codec:
    with reading(folder / DESCRIPTION, "its arguments load no codec"):
        if any(not isinstance(value, _ARGUMENTS[name]) for name, value in arguments.items()):
            raise ValueError(f"{arguments}")
        _check_source(arguments.get("spec", ""), arguments.get("path"))
        return load_codec(**arguments, device=device)


def _check_source(spec: str, path: str | None) -> None:
    """A data folder or a model may come from anyone, so it does not decide what is downloaded: SodaError for a hub id
    that is not the codec's usual one, unless it has been downloaded before."""
    if spec == "embedded" or path is None or path == DEFAULT_MODELS.get(spec) or Path(path).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise SodaError(
            f"{DESCRIPTION} names the codec {path}, which is not {spec}'s usual one ({DEFAULT_MODELS.get(spec)}) and "
            f"has not been downloaded before. If you trust it, run `hf download {path}` first."
        )
