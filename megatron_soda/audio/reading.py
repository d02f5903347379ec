"""Reads a recording as mono float32 samples at the codec's rate, piece by piece, or gives one clear reason why not.

A recording of any length is decoded, resampled and cut in blocks: ten hours need no more memory than a minute.
"""

import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import soxr
from av.error import InvalidDataError

from ..errors import SodaError
from .containers import CUT, Container, examine
from .sound import BadAudio, Sound
from .sound_bytes import open_sound, patched

SAMPLE_RATE = 24000
FRAME_SECONDS = 0.08  # one codec frame (12.5 Hz): shorter audio gives no tokens
SILENT_PEAK = 1e-3  # -60 dBFS
LOUDEST_PEAK = 10.0  # +20 dBFS: a float file scaled like integers, not just a loud recording
SAMPLE_RATES = (4000, 384000)  # anything outside is a damaged header
BLOCK = 1 << 20  # samples over all channels decoded at once
STEP = 1 << 14  # samples resampled at once: they fit in the cache, where soxr is nearly twice as fast
CUT_SECONDS = 10.0  # the part at the end of a piece that is searched for a quiet point
LENGTH_SLACK = 0.5, 0.02  # seconds, and share of the length: how far off a manifest may be, whichever is more
SEGMENT_SLACK = 0.1  # seconds that a segment may extend past the end: transcripts are rounded
DECLARED_SLACK = 0.25  # seconds of the declared length that may be missing: what encoders add and players drop
DECLARING = {"mov", "wv", "tta", "ape", "matroska", "webm"}  # ffmpeg's formats that state a length
PREROLL = 1.0  # seconds decoded before a segment's start, for what lossy formats carry from packet to packet

Blocks = Iterator[np.ndarray]


def read_pieces(
    sound: Sound | Path | str,
    sample_rate: int,
    samples_per_frame: int,
    *,
    piece_seconds: float = 60.0,
    trim: bool = False,
) -> Iterator[np.ndarray]:
    """Reads a recording of any length. Yields pieces, float32 [samples], mono (the mean of the channels), full scale
    +-1, at `sample_rate` Hz. Concatenated, the pieces are the recording, sample for sample.

    A piece has at most `piece_seconds` (at least two codec frames). All but the last consist of whole codec frames of
    `samples_per_frame` samples and end at the quietest point of their last ten seconds, so that pieces can be encoded
    one by one and their codes joined. With `trim`, silence and noise before the first and after the last speech are
    dropped, except for 0.2 s (see speech_activity.py).

    Raises BadAudio for a recording that cannot be read, is truncated (if the format reveals it), has NaN or infinite
    samples, is silent (peak below -60 dBFS), too loud, differs from the manifest's `sound.seconds`, is shorter than one
    codec frame or, with `trim`, has no speech. Some of this shows only at the end, so pieces may come first; discard
    them. Raises SodaError for `trim` without its package, and nothing else.
    """
    with reasons():
        blocks = _wave(sound, sample_rate, samples_per_frame / sample_rate, math.inf, trim)
        yield from cut(blocks, sample_rate, samples_per_frame, piece_seconds)


def read_audio(sound: Sound | Path | str, sample_rate: int = SAMPLE_RATE, max_seconds: float = 60.0) -> np.ndarray:
    """Reads a recording of at most `max_seconds`: float32 [samples], mono, full scale +-1, at `sample_rate` Hz.

    Raises BadAudio, and nothing else: like read_pieces (with codec frames of 80 ms), and for a longer recording.
    """
    with reasons():
        return np.concatenate(list(_wave(sound, sample_rate, FRAME_SECONDS, max_seconds, trim=False)))


def _wave(sound: Sound | Path | str, sample_rate: int, shortest: float, longest: float, trim: bool) -> Blocks:
    sound = sound if isinstance(sound, Sound) else Sound(os.fspath(sound))
    with ExitStack() as stack:
        rate, blocks = _decode(sound, longest, stack)
        if sound.seconds:
            blocks = _of_length(blocks, rate, sound.seconds)
        yield from finish(blocks, rate, sample_rate, shortest=shortest, longest=longest, trim=trim)


# --- samples


def finish(
    blocks: Blocks,
    rate: int,
    sample_rate: int,
    *,
    shortest: float,
    longest: float,
    trim: bool,
    resampled: np.ndarray | None = None,
) -> Blocks:
    """Turns decoded blocks, float32 [samples, channels] at `rate` Hz, into checked mono blocks, float32 [samples], at
    `sample_rate` Hz. `shortest` and `longest` are in seconds. `resampled`: the only block, mono, if it has been
    resampled already. Raises BadAudio, partly only at the end."""
    blocks = _checked(blocks, rate, shortest, longest)
    if resampled is not None:
        blocks = (resampled for _ in blocks)
    elif rate != sample_rate:
        blocks = _resampled(blocks, rate, sample_rate)
    if trim:
        from . import speech_activity

        blocks = speech_activity.trim(blocks, sample_rate)
    return blocks


def _of_length(blocks: Blocks, rate: int, seconds: float) -> Blocks:
    """Passes blocks through. Raises BadAudio as soon as they are longer than the manifest says, or at the end if they
    are shorter: then the duration was not meant for this file, or this is the wrong file."""
    count = 0
    for block in blocks:
        count += len(block)
        if count / rate > seconds and not is_as_long(count / rate, seconds):
            raise BadAudio(f"not as long as the manifest says: over {seconds:g} s")
        yield block
    if not is_as_long(count / rate, seconds):
        raise BadAudio(f"not as long as the manifest says: {count / rate:.2f} s, not {seconds:g} s")


def is_as_long(length: float, seconds: float) -> bool:
    """Whether a recording of `length` seconds fits a manifest's `seconds`."""
    return abs(length - seconds) <= max(LENGTH_SLACK[0], LENGTH_SLACK[1] * seconds)


def _checked(blocks: Blocks, rate: int, shortest: float, longest: float) -> Blocks:
    count, peak = 0, 0.0
    for block in blocks:
        mono = block[:, 0]
        if (channels := block.shape[1]) > 1:  # numpy's mean over such short rows takes longer than decoding
            mono = sum(block.T[1:], mono) / channels
        count += len(mono)
        if count > longest * rate:
            raise BadAudio(f"too long: over {longest:g} s")
        highest = _peak(mono)
        if not math.isfinite(highest):
            raise BadAudio("NaN or infinite samples")
        if highest > LOUDEST_PEAK:
            raise BadAudio(f"too loud: peak {highest:.3g}; full scale is 1.0")
        peak = max(peak, highest)
        yield mono
    if count == 0:
        raise BadAudio("no samples")
    if count < shortest * rate:
        raise BadAudio(f"too short: {count / rate * 1000:.0f} ms; one codec frame is {shortest * 1000:.0f} ms")
    if peak < SILENT_PEAK:
        raise BadAudio("silent: peak below -60 dBFS")


def _peak(mono: np.ndarray) -> float:
    """The largest magnitude of float32 samples; infinite or NaN if any of them is. Compares their bits as integers,
    which order like the magnitudes: numpy's float max slows down the soxr call after it by more than its own time."""
    bits = mono.view(np.int32).max(initial=0), mono.view(np.uint32).max(initial=0)  # positive, negative
    return float(np.abs(np.array(bits, np.uint32).view(np.float32)).max())


def _resampled(blocks: Blocks, rate: int, sample_rate: int) -> Blocks:
    first = next(blocks)
    second = next(blocks, None)
    if second is None:  # short, as most are: gives the same samples faster
        yield soxr.resample(first, rate, sample_rate, quality="HQ")
        return
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in chain((first, second), blocks):
        for start in range(0, len(block), STEP):
            yield stream.resample_chunk(block[start : start + STEP])
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def cut(blocks: Blocks, sample_rate: int, samples_per_frame: int, piece_seconds: float) -> Blocks:
    """Assembles float32 [samples] blocks of any size into the pieces that read_pieces describes. The cuts do not depend
    on the blocks. The last piece also has at least one codec frame, if the whole has."""
    limit = int(piece_seconds * sample_rate + 1e-6) // samples_per_frame * samples_per_frame
    if limit < 2 * samples_per_frame:
        raise SodaError(f"pieces of {piece_seconds:g} s are too short: a piece needs at least two codec frames")
    held: list[np.ndarray] = []
    count = 0
    for block in chain(blocks, [None]):
        if block is not None:
            held.append(block)
            count += len(block)
        while count > limit and (block is None or count >= limit + samples_per_frame):
            samples = held[0] if len(held) == 1 else np.concatenate(held)
            at = _quietest(samples, limit, int(CUT_SECONDS * sample_rate), samples_per_frame)
            yield samples[:at]
            held, count = [samples[at:]], count - at
    if count:
        yield held[0] if len(held) == 1 else np.concatenate(held)


def _quietest(samples: np.ndarray, limit: int, search: int, frame: int) -> int:
    """The frame boundary with the least energy on both sides; if there are several, the last."""
    first = math.ceil(max(limit - search, limit / 2) / frame)
    last = min(limit, len(samples) - frame) // frame
    frames = samples[(first - 1) * frame : (last + 1) * frame].reshape(-1, frame)
    energy = np.einsum("ij,ij->i", frames, frames, dtype=np.float64)
    return (last - int(np.argmin((energy[:-1] + energy[1:])[::-1]))) * frame


# --- decoders


class Forward(soundfile.SoundFile):
    """Reads from front to back. Otherwise soundfile seeks to its own position after every block, and decodes again for
    that."""

    def seekable(self) -> bool:
        return False


def _decode(sound: Sound, longest: float, stack: ExitStack) -> tuple[int, Blocks]:
    """Returns the recording's own rate in Hz, and float32 [samples, channels] blocks, to be read before `stack`
    closes."""
    if not 0 <= sound.start < (sound.end or math.inf) or sound.end == math.inf:
        raise BadAudio(f"bad segment: {sound.start:g} s to {sound.end:g} s")
    file, name = open_sound(sound, stack)
    if name.lower().endswith(".g722"):  # headerless: only the name gives the format
        return _decode_av(file, "g722", sound, stack)
    container = _examined(sound, file)
    if container.patch:
        file = patched(file, container.patch)
    first: Exception | None = None
    if container.trusted:
        try:
            decoder = open_decoder(sound, file, container, stack)
            if decoder.channels <= 2:  # ffmpeg knows the channel layout
                return _decode_soundfile(decoder, sound, longest)
        except BadAudio:
            raise
        except Exception as error:  # not a format that libsndfile reads
            first = error
    try:
        file.seek(0)
        return _decode_av(file, None, sound, stack)
    except BadAudio:
        raise
    except Exception as second:
        why = " ".join(_why(error) for error in (first, second) if error)
        raise BadAudio(f"cannot be read: {why}") from None


def _examined(sound: Sound, file: BinaryIO) -> Container:
    """Examines a recording's container, only once for one that is cut into consecutive segments."""
    global _last
    if not sound.start and not sound.end:
        return examine(file)
    stat = os.stat(sound.path)
    key = (sound.path, sound.offset, sound.size, sound.row, sound.column, stat.st_mtime_ns, stat.st_size)
    with _one_thread:
        if _last[0] != key:
            _last = key, examine(file)
        return _last[1]


_last: tuple[Any, Container] = None, Container()
_one_thread = threading.Lock()


def open_decoder(sound: Sound, file: BinaryIO, container: Container, stack: ExitStack) -> Forward:
    """Opens the recording in libsndfile. Raises BadAudio for a bad rate, and libsndfile's own errors for what it cannot
    read."""
    file.seek(0)
    plain = sound.offset < 0 and sound.row < 0 and not container.patch
    decoder = stack.enter_context(Forward(sound.path if plain else file, "r"))
    _check_rate(decoder.samplerate)
    return decoder


def _decode_soundfile(decoder: Forward, sound: Sound, longest: float) -> tuple[int, Blocks]:
    rate, frames = decoder.samplerate, decoder.frames
    begin, end = round(sound.start * rate), round(sound.end * rate) or frames
    if 0 < begin >= frames or end > frames + SEGMENT_SLACK * rate:
        raise BadAudio(f"bad segment: {sound.start:g} s to {sound.end:g} s of {frames / rate:.2f} s")
    count = min(end, frames) - begin
    if count > longest * rate:  # before decoding: a small file can decode to hours
        raise BadAudio(f"too long: {count / rate:.1f} s; the limit is {longest:g} s")
    return rate, _soundfile_blocks(decoder, begin, count)


def _soundfile_blocks(decoder: Forward, begin: int, count: int) -> Blocks:
    if begin:
        decoder.seek(begin)
    step = max(1, BLOCK // decoder.channels)
    # Gives the same values: libsndfile's own conversion takes half as long as resampling.
    dtype = "int16" if (decoder.format, decoder.subtype) == ("WAV", "PCM_16") else "float32"
    while count > 0:
        block = decoder.read(min(step, count), dtype=dtype, always_2d=True)
        if len(block) == 0:
            raise BadAudio(CUT)
        count -= len(block)
        yield block if dtype == "float32" else np.multiply(block, np.float32(2**-15), dtype=np.float32)


def _decode_av(file: BinaryIO, format: str | None, sound: Sound, stack: ExitStack) -> tuple[int, Blocks]:
    # No protocols are allowed, so a disguised playlist opens neither network addresses nor other files.
    container = stack.enter_context(av.open(file, format=format, options={"protocol_whitelist": "none"}))
    if not container.streams.audio:
        raise BadAudio("no audio in this file")
    rate = container.streams.audio[0].rate
    _check_rate(rate)
    return rate, _av_blocks(container, rate, sound.start, sound.end)


def _av_blocks(container: Any, rate: int, start: float, end: float) -> Blocks:
    stream = container.streams.audio[0]
    zero = stream.start_time or 0
    jump = start > PREROLL
    if jump:
        with suppress(Exception):  # a format that cannot seek is decoded from its beginning
            container.seek(zero + int((start - PREROLL) / stream.time_base), stream=stream)
    to_float = av.AudioResampler(format="flt")  # same rate and channels; PyAV 18 crashes on eight planes
    begin, stop = round(start * rate), round(end * rate) or sys.maxsize
    parts: list[np.ndarray] = []
    at, held, layout = -1, 0, ""  # `at` counts from the recording's start
    for frame in _frames(container, stream):
        if frame.sample_rate != rate or (layout and frame.layout.name != layout):
            raise BadAudio("its sample rate or channels change partway through")
        if not layout:
            layout, weights = frame.layout.name, _downmix([channel.name for channel in frame.layout.channels])
        if at < 0:
            if jump and frame.pts is None:
                raise BadAudio("bad segment: the recording has no time stamps")
            at = max(0, round((frame.pts - zero) * stream.time_base * rate)) if jump else 0
        for part in to_float.resample(frame):
            samples = part.to_ndarray().reshape(part.samples, -1)[max(0, begin - at) : max(0, stop - at)]
            at += part.samples
            if samples.size:
                held += samples.size
                parts.append(samples @ weights if weights is not None else samples)
        if held >= BLOCK:
            yield np.concatenate(parts)
            parts, held = [], 0
        if at >= stop:
            break
    else:
        declared = _declared(container, stream)
        if at / rate < declared - DECLARED_SLACK:
            raise BadAudio(CUT)
        if (end and at / rate < end - SEGMENT_SLACK) or 0 < begin >= at:
            raise BadAudio(f"bad segment: {start:g} s to {end:g} s of {max(at, 0) / rate:.2f} s")
    if parts:
        yield np.concatenate(parts)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames. MPEG audio may begin with a frame that depends on a missing one, for example where files were
    concatenated; such a frame is skipped, as in every player."""
    lost = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:
            lost += 1
            if not stream.codec_context.name.startswith("mp") or lost > 3:
                raise
            continue
        lost = 0
        yield from frames


def _declared(container: Any, stream: Any) -> float:
    """The declared length in seconds; 0 if the file declares none and ffmpeg would guess."""
    if not DECLARING & set(container.format.name.split(",")):
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / av.time_base


def _downmix(channels: list[str]) -> np.ndarray | None:
    """float32 [channels, 1]: the weights for mixing surround sound to mono, or None if the mean is right. Speech is in
    the centre; a mean over six channels would leave a sixth of it. Six or eight unlabelled channels are taken for a
    film's, as in every player; other numbers for microphones."""
    if len(channels) in (6, 8) and set(channels) == {"NONE"}:
        channels = ["FL", "FR", "FC", "LFE", *["BL", "BR", "SL", "SR"][: len(channels) - 4]]
    if len(channels) <= 2 or "FC" not in channels:
        return None
    weights = {"FC": 1.0, "FL": 0.5, "FR": 0.5, "LFE": 0.0}  # left and right as in a stereo mean
    return np.array([[weights.get(name, math.sqrt(0.125))] for name in channels], np.float32)


# --- reasons


@contextmanager
def reasons() -> Iterator[None]:
    """Turns decoder errors into BadAudio: decoders fail in many ways on damaged bytes, and a worker must carry on."""
    try:
        yield
    except (BadAudio, SodaError):
        raise
    except Exception as error:
        raise BadAudio(f"cannot be read: {_why(error)}") from error


def _why(error: Exception) -> str:
    """A decoder's own message, without the path."""
    words = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return f"{type(error).__name__}: {words}"


def _check_rate(rate: int) -> None:
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise BadAudio(f"bad sample rate: {rate} Hz")
