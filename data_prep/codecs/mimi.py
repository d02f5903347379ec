"""Mimi (Défossez et al., "Moshi", 2024) through transformers' MimiModel: the codec of the SODA models."""

import hashlib
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, MimiModel

from megatron_soda.errors import SodaError


class MimiCodec:
    """The first `codebooks` codebooks of a Mimi model, a `Codec`.

    Utterances are encoded one by one, padded with silence to whole frames: a batch with padding gives other codes than
    its members alone, because the padding enters the convolutions and the attention (transformers#43377).
    """

    name = "mimi"

    def __init__(self, model: str, codebooks: int = 8, device: str = "cpu") -> None:
        """`model` is a local folder or a hub id ("kyutai/mimi")."""
        self._model = cast(Any, _load(model)).to(device)
        self._device = device
        config = self._model.config
        if not 1 <= codebooks <= config.num_quantizers:
            raise SodaError(f"codec: {model} has {config.num_quantizers} codebooks, {codebooks} were asked for.")
        self.codebooks = codebooks
        self.entries: int = config.codebook_size
        self.sample_rate: int = config.sampling_rate
        self.samples_per_frame = round(config.sampling_rate / config.frame_rate)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        settings = f"mimi transformers {transformers.__version__} {torch.device(self._device).type} {self.codebooks}"
        digest = hashlib.sha256(settings.encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Mono float32 waves in [-1, 1] at 24 kHz -> int16 codes (frames, codebooks), frames = ceil(samples / 1920)."""
        return [self._encode_one(wave, i) for i, wave in enumerate(waves)]

    @torch.inference_mode()
    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Codes (frames, codebooks) -> mono float32 waves of 1920 * frames samples at 24 kHz."""
        return [self._decode_one(c, i) for i, c in enumerate(codes)]

    def _encode_one(self, wave: np.ndarray, i: int) -> np.ndarray:
        wave = np.asarray(wave)
        if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating) or not np.isfinite(wave).all():
            raise SodaError(
                f"mimi: wave {i} has shape {wave.shape} and type {wave.dtype}; finite mono float32 samples in [-1, 1] "
                f"at {self.sample_rate} Hz are needed. Repair or leave out the file."
            )
        frames = math.ceil(len(wave) / self.samples_per_frame)
        if frames == 0:
            return np.zeros((0, self.codebooks), dtype=np.int16)
        padded = np.zeros(frames * self.samples_per_frame, dtype=np.float32)
        padded[: len(wave)] = wave
        batch = torch.from_numpy(padded)[None, None].to(self._device)
        codes = cast(Tensor, self._model.encode(batch, num_quantizers=self.codebooks).audio_codes)
        return codes[0, :, :frames].T.to(torch.int16).cpu().numpy()

    def _decode_one(self, codes: np.ndarray, i: int) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codebooks or not np.issubdtype(codes.dtype, np.integer):
            raise SodaError(
                f"mimi: codes {i} have shape {codes.shape}; (frames, {self.codebooks}) integers are needed."
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < self.entries):
            raise SodaError(f"mimi: codes {i} go beyond 0 to {self.entries - 1}.")
        if len(codes) == 0:
            return np.zeros(0, dtype=np.float32)
        batch = torch.from_numpy(codes.astype(np.int64).T)[None].to(self._device)
        audio = cast(Tensor, self._model.decode(batch).audio_values)
        return audio[0, 0, : len(codes) * self.samples_per_frame].float().cpu().numpy()


def _load(model: str) -> MimiModel:
    advice = "Give a local folder with a Mimi model (config.json and model.safetensors), or use `codec: embedded`."
    try:
        model_type = AutoConfig.from_pretrained(model).model_type
        if model_type != "mimi":
            raise SodaError(f"codec: {model} holds a model of type {model_type!r}, not Mimi. {advice}")
        loaded, info = cast(
            tuple[MimiModel, dict[str, Any]],
            MimiModel.from_pretrained(model, output_loading_info=True, use_safetensors=True, dtype=torch.float32),
        )
    except (OSError, ValueError) as error:
        what = "" if Path(model).is_dir() else " is no local folder and"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SodaError(f"codec: {model}{what} could not be loaded as Mimi ({reason}). {advice}") from error
    if info["missing_keys"]:
        raise SodaError(f"codec: {model} lacks weights such as {min(info['missing_keys'])}. {advice}")
    return loaded.eval()
