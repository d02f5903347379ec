"""Audio codecs: sound to discrete codes and back. `load_codec` is the entry; a codec is imported when asked for."""

import difflib
from pathlib import Path

from megatron_soda.errors import SodaError

from .base import Codec

NAMES = ("embedded", "mimi")
QUANTISER_FILE = "codec.safetensors"
DEFAULT_MIMI = "kyutai/mimi"

__all__ = ["NAMES", "QUANTISER_FILE", "Codec", "load_codec"]


def load_codec(spec: str, path: str | Path | None = None, *, codebooks: int | None = None) -> Codec:
    """Loads a codec by name.

    Args:
        spec: "embedded" (needs no download) or "mimi".
        path: of the embedded codec, a fitted quantiser (the file, or a folder with `codec.safetensors`), by default
            the shipped one; of Mimi, a local folder or a hub id, by default "kyutai/mimi".
        codebooks: of Mimi, how many of its codebooks to use, by default the first 8. The embedded codec has as many as
            it was fitted with; another number is an error.
    """
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

        return MimiCodec(str(path) if path is not None else DEFAULT_MIMI, codebooks=codebooks or 8)
    nearest = (difflib.get_close_matches(spec.lower(), NAMES, n=1, cutoff=0.0) or NAMES)[0]
    raise SodaError(f"codec: {spec!r} is not known; did you mean {nearest!r}? There are: {', '.join(NAMES)}.")
