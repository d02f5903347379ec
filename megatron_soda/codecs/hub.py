"""What codecs based on transformers models share: loading, checks, and batching.

A code is the nearest of many entries, so the last bit of a float can change it, and floats change with the shape of the
batch. On a CPU, every wave is therefore encoded alone by default. Elsewhere waves share batches, whose shape depends
only on a wave's own length: the number of rows is fixed, missing waves are silence, and the length is rounded up. So a
wave's codes do not depend on the rest of the list, even if there is no rest, as long as the device computes each row
independently of the others and of its index; see tests/codecs/test_codec_hub.py.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from ..errors import SodaError
from ..files import check_regular

BATCH_SECONDS = 240.0  # of padded sound at once, except on a CPU: a few GiB of activations
ROWS = 8  # most waves in a batch; more would mean more rows of silence for lists as short as a shard's 64
MOST_ENTRIES = 2**15  # codes are int16
NOT_SETTINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Piece:
    """A stretch of a wave that the model sees at once."""

    wave: int  # index in the list
    start: int  # its first frame
    frames: int  # that the model sees; silence if the wave has fewer
    rows: int  # of its batch
    keep: slice  # which of these frames' codes to keep


class HubCodec:
    """A `Codec` around a transformers model; subclasses say which, and how to call it.

    Args:
        model: a local folder with config.json and model.safetensors, or a hub id. codebooks: how many to use, counted
        from the first; by default the codec's own choice. device: a torch device to run the model on. batch_seconds:
        most sound, padding included, that goes through the model at once; 0: one wave at a time, with the codes of a
        direct call to the model. By default 0 on a CPU, where batches are not faster, otherwise 240.

    Raises:
        SodaError: the model cannot be loaded, is of another kind, lacks weights or codebooks, or the device does not
        exist.
    """

    name: str
    title: ClassVar[str]  # in messages
    model_class: ClassVar[Any]
    default_codebooks: ClassVar[int | None] = None  # all

    def __init__(
        self, model: str, codebooks: int | None = None, device: str = "cpu", batch_seconds: float | None = None
    ) -> None:
        self._device = _usable(device)
        self._model: Any = _load(model, self.model_class, self.title)
        config = self._model.config
        self._prepare(model)
        available = self._available()
        if codebooks is None:
            codebooks = min(self.default_codebooks or available, available)
        if not 1 <= codebooks <= available:
            raise SodaError(
                f"codec: {model} has {available} codebooks, {codebooks} were asked for. Ask for 1 to {available}."
            )
        if config.codebook_size > MOST_ENTRIES:
            raise SodaError(
                f"codec: {model} has codebooks of {config.codebook_size} entries; codes are 16-bit integers, so at "
                f"most {MOST_ENTRIES} are possible. Use another model."
            )
        self.codebooks = codebooks
        self.entries: int = config.codebook_size
        self.sample_rate: int = config.sampling_rate
        self.samples_per_frame = self._stride()
        self._batch_seconds = batch_seconds
        if batch_seconds is None:
            self._batch_seconds = 0.0 if self._device.type == "cpu" else BATCH_SECONDS
        self._model.to(self._device)
        self.lookahead = self._lookahead()
        self.fingerprint = self._fingerprint()

    # ---- what a codec has to say

    def _prepare(self, model: str) -> None:
        """Refuses models that cannot be used, and applies settings needed before use."""

    def _available(self) -> int:
        """How many codebooks the model has."""
        raise NotImplementedError

    def _stride(self) -> int:
        """Samples of a frame."""
        raise NotImplementedError

    def _codes(self, waves: Tensor) -> Tensor:
        """Waves (rows, 1, samples) of whole frames -> codes (rows, codebooks or more, frames)."""
        raise NotImplementedError

    def _audio(self, codes: Tensor) -> Tensor:
        """Codes (1, codebooks, frames), int64 -> sound, 1 row, of about that many frames."""
        raise NotImplementedError

    def _lookahead(self) -> int | None:
        """See `Codec.lookahead`."""
        return None

    def _shortest_padded(self) -> int | None:
        """The number of frames from which on silence may follow a wave without changing its codes. None: never."""
        return None

    # ---- the same for all

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Mono float32 waves in [-1, 1] at `sample_rate` -> int16 codes (frames, codebooks) each.

        frames = ceil(samples / samples_per_frame): silence fills the last one. Raises SodaError if a wave is not mono,
        float and finite.
        """
        checked = [self._checked_wave(wave, i) for i, wave in enumerate(waves)]
        codes = [np.zeros((math.ceil(len(w) / self.samples_per_frame), self.codebooks), np.int16) for w in checked]
        alike: dict[tuple[int, int], list[Piece]] = {}
        for i, found in enumerate(codes):
            for piece in self._pieces(i, len(found)):
                alike.setdefault((piece.frames, piece.rows), []).append(piece)
        for (frames, rows), pieces in alike.items():
            for first in range(0, len(pieces), rows):
                together = pieces[first : first + rows]
                batch = np.zeros((rows, 1, frames * self.samples_per_frame), np.float32)
                for row, piece in zip(batch, together, strict=False):
                    start = piece.start * self.samples_per_frame
                    part = checked[piece.wave][start : start + row.size]
                    row[0, : len(part)] = part
                for found, piece in zip(self._run(batch, frames), together, strict=False):
                    kept = found[piece.keep]
                    start = piece.start + piece.keep.start
                    codes[piece.wave][start : start + len(kept)] = kept
        return codes

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Codes (frames, codebooks), integers -> mono float32 waves of frames * samples_per_frame samples each.

        One at a time on every device. Raises SodaError for a different number of codebooks, or codes out of range.
        """
        checked = [self._checked_codes(c, i) for i, c in enumerate(codes)]
        return [self._decode_one(c) for c in checked]

    def decode_part(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
        """The samples of frames [first, end) of what `decode` makes of one wave's codes, up to rounding. Decodes from
        the start, on which all of these models depend."""
        known = len(codes) if self.lookahead is None else end + self.lookahead
        return self.decode([codes[:known]])[0][first * self.samples_per_frame : end * self.samples_per_frame]

    def _pieces(self, wave: int, frames: int) -> list[Piece]:
        if frames == 0:
            return []
        if not self._batch_seconds:
            return [Piece(wave, 0, frames, 1, slice(0, frames))]
        return self._batch_pieces(wave, frames)

    def _batch_pieces(self, wave: int, frames: int) -> list[Piece]:
        """How a wave is laid out for batches, which depends only on its length."""
        shortest = self._shortest_padded()
        if shortest is None or frames < shortest:
            return [Piece(wave, 0, frames, 1, slice(0, frames))]
        length = rounded_up(max(frames, round(self.sample_rate / self.samples_per_frame)))
        return [Piece(wave, 0, length, self._rows(length), slice(0, frames))]

    def _rows(self, frames: int) -> int:
        assert self._batch_seconds is not None
        seconds = frames * self.samples_per_frame / self.sample_rate
        return max(1, min(ROWS, int(self._batch_seconds / seconds)))

    def _run(self, batch: np.ndarray, frames: int) -> np.ndarray:
        """Waves (rows, 1, samples) -> int16 codes (rows, frames, codebooks)."""
        with self._computing():
            codes = self._codes(torch.from_numpy(batch).to(self._device))
        if codes.shape[-1] < frames:
            raise SodaError(
                f"{self.name}: the model gave {codes.shape[-1]} frames for {frames} of {self.samples_per_frame} "
                "samples: its configuration does not match its strides. Fix config.json."
            )
        return codes[:, : self.codebooks, :frames].transpose(1, 2).to(torch.int16).cpu().numpy()

    def _decode_one(self, codes: np.ndarray) -> np.ndarray:
        wave = np.zeros(len(codes) * self.samples_per_frame, np.float32)
        if len(codes):
            with self._computing():
                audio = self._audio(torch.from_numpy(codes.T[None]).to(self._device))
            sound = audio.reshape(-1)[: len(wave)].float().cpu().numpy()
            wave[: len(sound)] = sound  # transposed convolutions with odd strides can give a few samples less
        return wave

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients; on CUDA no TF32, whose rounding changes codes, and no choosing kernels by timing."""
        exact = contextlib.nullcontext()
        if self._device.type == "cuda":
            exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            yield

    def _checked_wave(self, wave: np.ndarray, i: int) -> np.ndarray:
        wave = np.asarray(wave)
        if wave.ndim == 1 and np.issubdtype(wave.dtype, np.floating):
            with np.errstate(over="ignore"):
                samples = wave.astype(np.float32, copy=False)
            if np.isfinite(samples).all():
                return samples
        raise SodaError(
            f"{self.name}: wave {i} has shape {wave.shape} and type {wave.dtype}; finite mono float32 samples in "
            f"[-1, 1] at {self.sample_rate} Hz are needed. Repair or leave out the file."
        )

    def _checked_codes(self, codes: np.ndarray, i: int) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codebooks or not np.issubdtype(codes.dtype, np.integer):
            raise SodaError(
                f"{self.name}: codes {i} have shape {codes.shape} and type {codes.dtype}; (frames, {self.codebooks}) "
                "integers are needed. Load the codec with the number of codebooks that made the codes."
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < self.entries):
            raise SodaError(
                f"{self.name}: codes {i} range from {codes.min()} to {codes.max()}; this codec has codes 0 to "
                f"{self.entries - 1}. Use the codec that made them."
            )
        return codes.astype(np.int64)

    def _fingerprint(self) -> str:
        """16 hex digits over the weights and everything else that can change a code."""
        config = {k: v for k, v in self._model.config.to_dict().items() if k not in NOT_SETTINGS}
        settings = {
            "codec": self.name,
            "transformers": transformers.__version__,
            "device": self._device.type,
            "codebooks": self.codebooks,
            "batch": [self._batch_seconds, ROWS] if self._batch_seconds else 0,
            "attention": self._model.config._attn_implementation,
            "config": config,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def rounded_up(frames: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few lengths, so that waves can share batches, with about a fifth
    of padding."""
    step = max(1, 2 ** (frames.bit_length() - 2))
    return math.ceil(frames / step) * step


def _usable(device: str) -> torch.device:
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise SodaError(f"codec: device {device!r} cannot be used ({reason}). Take device cpu.") from error
    return usable


def _load(model: str, model_class: Any, title: str) -> Any:
    """The model in float32 for inference, from safetensors only: other formats can run code."""
    advice = f"Give a local folder with {title} (config.json and model.safetensors), or use `codec: embedded`."
    try:
        for path in Path(model).glob("*"):
            check_regular(path)
        if (Path(model) / "adapter_config.json").exists():
            raise SodaError(f"codec: {model} holds an adapter, which names another model. {advice}")
        model_type = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        if model_type != model_class.config_class.model_type:
            raise SodaError(f"codec: {model} holds a model of type {model_type!r}, not {title}. {advice}")
        loaded, info = model_class.from_pretrained(
            model,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below
            dtype=torch.float32,
        )
    except SodaError:
        raise
    except Exception as error:  # for an arbitrary config.json, transformers raises anything
        what = "" if Path(model).is_dir() else " is not a local folder and"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SodaError(f"codec: {model}{what} could not be loaded as {title} ({reason}). {advice}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise SodaError(
            f"codec: {model}: {name} has shape {tuple(found)}, by config.json it is {tuple(wanted)}. {advice}"
        )
    if info["missing_keys"]:
        raise SodaError(f"codec: {model} lacks weights such as {min(info['missing_keys'])}. {advice}")
    for name, tensor in loaded.state_dict().items():
        if not tensor.isfinite().all():
            raise SodaError(f"codec: {model}: {name} has values that are not finite numbers. {advice}")
    return loaded.eval()
