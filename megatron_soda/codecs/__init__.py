"""Audio codecs: sound to discrete codes and back. `load_codec` loads one; a codec is imported only when needed."""

import difflib
from pathlib import Path

from ..errors import SodaError
from .base import Codec

NAMES = ("embedded", "mimi", "encodec", "dac")
QUANTISER_FILE = "codec.safetensors"
DEFAULT_MODELS = {"mimi": "kyutai/mimi", "encodec": "facebook/encodec_24khz", "dac": "descript/dac_24khz"}

__all__ = ["DEFAULT_MODELS", "NAMES", "QUANTISER_FILE", "Codec", "load_codec"]


def load_codec(
    spec: str, path: str | Path | None = None, *, codebooks: int | None = None, device: str = "cpu"
) -> Codec:
    """Loads a codec by name.

    Args:
        spec: "embedded" (needs no download), "mimi", "encodec" or "dac". path: for the embedded codec, a fitted
        quantiser (the file, or a folder with `codec.safetensors`), by default the shipped one; for the others, a local
        folder or a hub id, by default the one in `DEFAULT_MODELS`. codebooks: how many to use, counted from the first;
        by default 8 for Mimi and EnCodec (6 kbps), all for DAC. The embedded codec has as many as it was fitted with;
        another number is an error. device: a torch device to run the model on ("cpu", "cuda"). The embedded codec
        always runs on the CPU.

    Raises:
        SodaError: no such codec, model or device, or not that many codebooks.
    """
    model = str(path) if path is not None else DEFAULT_MODELS.get(spec, "")
    if spec == "embedded":
        from .embedded import EmbeddedCodec

        if path is not None and Path(path).is_dir():
            path = Path(path) / QUANTISER_FILE
        codec = EmbeddedCodec.load(path)
        if codebooks not in (None, codec.codebooks):
            raise SodaError(
                f"codec: embedded: {path or 'the shipped quantiser'} has {codec.codebooks} codebooks, not {codebooks}. "
                f"Ask for {codec.codebooks}, or fit a quantiser with {codebooks}."
            )
        return codec
    if spec == "mimi":
        from .mimi import MimiCodec

        return MimiCodec(model, codebooks, device)
    if spec == "encodec":
        from .encodec import EncodecCodec

        return EncodecCodec(model, codebooks, device)
    if spec == "dac":
        from .dac import DacCodec

        return DacCodec(model, codebooks, device)
    nearest = (difflib.get_close_matches(spec.lower(), NAMES, n=1, cutoff=0.0) or NAMES)[0]
    raise SodaError(f"codec: {spec!r} is not known; did you mean {nearest!r}? There are: {', '.join(NAMES)}.")
