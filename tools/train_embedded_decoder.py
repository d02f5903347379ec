"""Creates megatron_soda/codecs/embedded.safetensors: the embedded codec's decoder and default quantiser.

Both are trained on the French, Italian and Russian prompts of the Debian packages asterisk-core-sounds-*-g722. English
and Spanish (one other speaker) are never used, so they can serve for evaluation. See megatron_soda/codecs/WEIGHTS.md.

    python tools/train_embedded_decoder.py # 15 minutes of training on two cores python tools/train_embedded_decoder.py
    --minutes 2 --output trial.safetensors python tools/train_embedded_decoder.py --packages ~/debs # already downloaded
    packages
"""

import gzip
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import safetensors.torch
import soxr
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep import asterisk
from megatron_soda.codecs import embedded, embedded_decoder, embedded_quantiser
from megatron_soda.codecs.features import SAMPLE_RATE, SUBFRAME, Features, analyse
from megatron_soda.errors import run_tool
from megatron_soda.files import atomic_path

LANGUAGES = ("fr", "it", "ru")
VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
BATCH = 10
SEGMENT = 48  # sub-frames of 20 ms: 0.96 s
EDGE = SUBFRAME  # samples at either end of a segment that the loss ignores, because the network lacks context there
LEARNING_RATE = 1e-3
SPEEDS = (1.0, 0.87, 1.15)  # each half of the utterances is also used slower (lower) and faster, for more voices

console = Console()


@dataclass
class Prompt:
    id: str
    text: str
    wave: np.ndarray  # float32 mono at 24 kHz


def read_prompts(language: str, folder: Path) -> dict[str, Prompt]:
    """A language's prompts with a plain transcript, by id, from its two Debian packages."""
    asterisk.fetch(folder, [language])
    root = folder / language / "usr/share"
    transcript = root / f"doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    prompts = {}
    for line in gzip.decompress(transcript.read_bytes()).decode("utf-8-sig").splitlines():
        prompt, separator, text = (part.strip() for part in line.partition(":"))
        sound = root / "asterisk/sounds" / VOICES[language] / f"{prompt}.g722"
        # A line that opens with a bracket describes the sound ("[beep]") instead of transcribing it.
        if line.startswith(";") or not separator or not text or text[0] in "[<(" or not sound.is_file():
            continue
        prompts[prompt] = Prompt(prompt, text, read_g722(sound))
    return prompts


def read_g722(path: Path) -> np.ndarray:
    """A headerless G.722 file (16 kHz) -> float32 mono at 24 kHz"""
    with av.open(str(path), format="g722") as container:
        samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    return soxr.resample(samples.astype(np.float32) / 32768, 16_000, SAMPLE_RATE).astype(np.float32)


def spectral_loss(output: Tensor, target: Tensor) -> Tensor:
    """Multi-resolution STFT loss (Yamamoto, Song and Kim, "Parallel WaveGAN", 2020): log magnitude and convergence."""
    loss = torch.zeros(())
    resolutions = ((2048, 480), (1024, 240), (512, 120), (240, 60))
    for size, hop in resolutions:
        window = torch.hann_window(size)
        unit = window.square().sum().sqrt()
        a, b = (torch.stft(x, size, hop, window=window, return_complex=True).abs() / unit for x in (output, target))
        loss = loss + ((a + 2e-4).log() - (b + 2e-4).log()).abs().mean() + 0.5 * (a - b).norm() / (b.norm() + 1e-3)
    return loss / len(resolutions)


@dataclass
class Example:
    wave: Tensor  # (480 * n,)
    exact: Features  # measured
    coded: Features  # reconstructed from the codes


def cross_coded(waves: list[np.ndarray], languages: list[str], seed: int) -> list[Example]:
    """Each half of the utterances, coded by a quantiser fitted on the other half.

    A quantiser codes the speech it was fitted on better than new speech, and the decoder must learn from the errors it
    will meet in use.
    """
    generator = np.random.default_rng(seed)
    half = np.empty(len(waves), dtype=int)
    for language in set(languages):
        members = np.flatnonzero(np.array(languages) == language)
        half[generator.permutation(members)] = np.arange(len(members)) % 2
    examples = []
    analysed = [analyse([torch.from_numpy(_at_speed(w, speed)) for w in waves]) for speed in SPEEDS]
    for side in (0, 1):
        quantiser = embedded_quantiser.fit_quantiser(
            [f for f, h in zip(analysed[0], half, strict=True) if h != side], 8, 2048, seed
        )
        for speed, features in zip(SPEEDS, analysed, strict=True):
            for i in np.flatnonzero(half == side):
                wave = torch.from_numpy(_at_speed(waves[i], speed))
                wave = F.pad(wave, (0, SUBFRAME * len(features[i]) - len(wave)))
                examples.append(Example(wave, features[i], quantiser.decode(quantiser.encode(features[i]))))
    return [e for e in examples if len(e.exact) > SEGMENT]


def _at_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    return wave if speed == 1.0 else soxr.resample(wave, SAMPLE_RATE * speed, SAMPLE_RATE).astype(np.float32)


def batch_of(examples: list[Example], generator: np.random.Generator, shares: np.ndarray) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {n: [] for n in ("wave", "envelope", "f0", "voicing", "pulse_f0")}
    for i in generator.choice(len(examples), BATCH, p=shares):
        example = examples[i]
        start = int(generator.integers(0, len(example.exact) - SEGMENT + 1))
        part = slice(start, start + SEGMENT)
        gain = float(generator.uniform(-embedded_quantiser.GAIN_RANGE, embedded_quantiser.GAIN_RANGE))
        rows["wave"].append(math.exp(gain) * example.wave[start * SUBFRAME : (start + SEGMENT) * SUBFRAME])
        rows["envelope"].append(example.coded.envelope[part] + gain)
        rows["f0"].append(example.coded.f0[part])
        rows["voicing"].append(example.coded.voicing[part])
        rows["pulse_f0"].append(example.exact.f0[part])
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


def train_decoder(
    examples: list[Example], minutes: float, seed: int, log: Path
) -> tuple[embedded_decoder.FilterGainDecoder, float]:
    """Trains for a given time with a cosine schedule; returns the decoder and the last mean loss."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    decoder = embedded_decoder.FilterGainDecoder()
    optimiser = torch.optim.AdamW(decoder.parameters(), LEARNING_RATE, betas=(0.8, 0.99))
    lengths = np.array([len(e.exact) for e in examples], dtype=float)
    shares = lengths / lengths.sum()
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task("training the decoder", total=1.0, loss="")
        while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
            rate = LEARNING_RATE * min(1.0, (len(losses) + 1) / 50) * (0.5 * (1 + math.cos(math.pi * share)) + 0.02)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = batch_of(examples, generator, shares)
            wave = batch.pop("wave")
            output = decoder(**batch, noise=torch.randn_like(wave))
            loss = spectral_loss(output[:, EDGE:-EDGE], wave[:, EDGE:-EDGE])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
            if len(losses) in (1, 10) or len(losses) % 50 == 0:
                mean = float(np.mean(losses[-50:]))
                progress.update(task, completed=share, loss=f"step {len(losses)} loss {mean:.3f}")
                print(f"step {len(losses)} loss {mean:.4f} {60 * minutes * share:.0f} s", file=file, flush=True)
    return decoder.eval(), float(np.mean(losses[-100:]))


def main(
    output: Annotated[Path, typer.Option(help="file to write")] = embedded_decoder.SHIPPED_WEIGHTS,
    packages: Annotated[Path, typer.Option(help="folder of the Debian packages")] = Path("downloads/asterisk"),
    minutes: Annotated[float, typer.Option(help="training time; 0 writes a decoder that corrects nothing")] = 15.0,
    seed: int = 0,
    threads: int = 2,
    log: Annotated[Path, typer.Option(help="file to append the losses to")] = Path("downloads/decoder.log"),
) -> None:
    """Trains the embedded codec's decoder and fits its default quantiser; writes one .safetensors file.

    Needs apt-get and dpkg-deb (Debian or Ubuntu), but not root. Examples:

    python tools/train_embedded_decoder.py

    python tools/train_embedded_decoder.py --minutes 2 --output trial.safetensors
    """
    torch.set_num_threads(threads)
    waves: list[np.ndarray] = []
    languages: list[str] = []
    for language in LANGUAGES:
        prompts = read_prompts(language, packages)
        waves += [p.wave for p in prompts.values()]
        languages += [language] * len(prompts)
    seconds = sum(map(len, waves)) / SAMPLE_RATE
    console.print(f"{len(waves)} utterances, {seconds:.0f} s; fitting the shipped quantiser")
    quantiser = embedded_quantiser.fit_quantiser(analyse([torch.from_numpy(w) for w in waves]), 8, 2048, seed)
    console.print("coding each half with a quantiser of the other half")
    examples = cross_coded(waves, languages, seed) if minutes > 0 else []
    if minutes > 0:
        decoder, loss = train_decoder(examples, minutes, seed, log)
        console.print(f"final loss {loss:.4f}")
    else:
        decoder = embedded_decoder.FilterGainDecoder()
    tensors = {**quantiser.tensors()}
    tensors.update({embedded_decoder.PREFIX + n: t.detach() for n, t in decoder.state_dict().items()})
    with atomic_path(output) as temporary:
        metadata = {"format": embedded.FORMAT, "version": embedded.VERSION, "license": "CC-BY-SA-3.0, see WEIGHTS.md"}
        data = safetensors.torch.save({n: t.half().contiguous() for n, t in tensors.items()}, metadata)
        temporary.write_bytes(data)
    console.print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_tool(main)
