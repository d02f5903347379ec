"""A recording -> mono float32 samples at the codec's rate, a piece at a time, or one clear reason why not.

Whatever its length, a recording is decoded, resampled and cut in blocks: ten hours need no more memory than a minute.
"""

import math
import os
import sys
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
FRAME_SECONDS = 0.08  # one codec frame (12.5 Hz): shorter audio gives no token
SILENT_PEAK = 1e-3  # -60 dBFS
LOUDEST_PEAK = 10.0  # +20 dBFS: a float file scaled like integers, not merely a hot recording
SAMPLE_RATES = (4000, 384000)  # anything else is a damaged header
BLOCK = 1 << 20  # samples of all channels that are decoded at once
STEP = 1 << 14  # samples resampled at once: they fit the cache, where soxr is nearly twice as fast
CUT_SECONDS = 10.0  # the end of a piece that is searched for a quiet place
LENGTH_SLACK = 0.5, 0.02  # seconds, and of the length: what a manifest's may be wrong by, whichever is more
SEGMENT_SLACK = 0.1  # seconds that a segment may go on after the end: transcripts are rounded
DECLARED_SLACK = 0.25  # seconds that may lack of what a file declares: what encoders add and players leave out
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
    """Reads a recording of any length: yields pieces, float32 [samples], mono (the mean of the channels), full scale
    +-1, at `sample_rate` Hz. The pieces put together are the recording, sample by sample.

    A piece has at most `piece_seconds` (two codec frames or more). All but the last are whole codec frames of
    `samples_per_frame` samples and end at the quietest place of their last ten seconds, so that pieces can be encoded
    one by one and their codes joined. With `trim`, silence and noise before the first and after the last speech are
    left out, but for 0.2 s (see speech_activity.py).

    Raises BadAudio for a recording that cannot be read, is cut off (where the format tells), has NaN or infinite
    samples, is silent (peak below -60 dBFS), too loud, not of the `sound.seconds` that a manifest says, shorter than
    one codec frame, or, with `trim`, has no speech;
    some of it shows only at the end, so pieces may come first: they are to be thrown away. Raises SodaError for
    `trim` without its package, and nothing else.
    """
    with reasons():
        blocks = _wave(sound, sample_rate, samples_per_frame / sample_rate, math.inf, trim)
        yield from cut(blocks, sample_rate, samples_per_frame, piece_seconds)


def read_audio(sound: Sound | Path | str, sample_rate: int = SAMPLE_RATE, max_seconds: float = 60.0) -> np.ndarray:
    """Reads a recording of `max_seconds` at most: float32 [samples], mono, full scale +-1, at `sample_rate` Hz.

    Raises BadAudio, and nothing else: as read_pieces (one codec frame being 80 ms), and for a longer recording.
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


def finish(blocks: Blocks, rate: int, sample_rate: int, *, shortest: float, longest: float, trim: bool) -> Blocks:
    """Decoded blocks, float32 [samples, channels] at `rate` Hz, to checked mono blocks, float32 [samples], at
    `sample_rate` Hz. `shortest` and `longest` are in seconds. Raises BadAudio, some of it only at the end."""
    blocks = _checked(blocks, rate, shortest, longest)
    if rate != sample_rate:
        blocks = _resampled(blocks, rate, sample_rate)
    if trim:
        from . import speech_activity

        blocks = speech_activity.trim(blocks, sample_rate)
    return blocks


def _of_length(blocks: Blocks, rate: int, seconds: float) -> Blocks:
    """The same blocks. Raises BadAudio as soon as they are longer than a manifest says, or at the end if shorter: then
    its duration was not meant as this file's, or the file is another one."""
    count = 0
    for block in blocks:
        count += len(block)
        if count / rate > seconds and not is_as_long(count / rate, seconds):
            raise BadAudio(f"not as long as the manifest says: over {seconds:g} s")
        yield block
    if not is_as_long(count / rate, seconds):
        raise BadAudio(f"not as long as the manifest says: {count / rate:.2f} s, not {seconds:g} s")


def is_as_long(length: float, seconds: float) -> bool:
    """Whether a recording of `length` seconds may be one of which a manifest says `seconds`."""
    return abs(length - seconds) <= max(LENGTH_SLACK[0], LENGTH_SLACK[1] * seconds)


def _checked(blocks: Blocks, rate: int, shortest: float, longest: float) -> Blocks:
    count, peak = 0, 0.0
    for block in blocks:
        mono = block[:, 0]
        if (channels := block.shape[1]) > 1:  # numpy's mean of so short rows takes longer than decoding
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
    """The largest magnitude of float32 samples; infinite or NaN if any of them is. By their bits, which as integers
    have the order of the magnitudes: after numpy's max of floats soxr is slower, by more than the max itself takes."""
    bits = mono.view(np.int32).max(initial=0), mono.view(np.uint32).max(initial=0)  # of the positive, of the negative
    return float(np.abs(np.array(bits, np.uint32).view(np.float32)).max())


def _resampled(blocks: Blocks, rate: int, sample_rate: int) -> Blocks:
    first = next(blocks)
    second = next(blocks, None)
    if second is None:  # short, as most are; the same samples, but sooner
        yield soxr.resample(first, rate, sample_rate, quality="HQ")
        return
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in chain((first, second), blocks):
        for start in range(0, len(block), STEP):
            yield stream.resample_chunk(block[start : start + STEP])
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def cut(blocks: Blocks, sample_rate: int, samples_per_frame: int, piece_seconds: float) -> Blocks:
    """Puts float32 [samples] blocks of any size together to the pieces that read_pieces describes. Where the cuts are
    does not depend on the blocks. The last piece has at least one codec frame too, if all has."""
    limit = int(piece_seconds * sample_rate + 1e-6) // samples_per_frame * samples_per_frame
    if limit < 2 * samples_per_frame:
        raise SodaError(f"pieces of {piece_seconds:g} s are too short: a piece needs two codec frames at least")
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
    """The frame boundary with the least energy in the frames at its sides; of several, the last."""
    first = math.ceil(max(limit - search, limit / 2) / frame)
    last = min(limit, len(samples) - frame) // frame
    frames = samples[(first - 1) * frame : (last + 1) * frame].reshape(-1, frame)
    energy = np.einsum("ij,ij->i", frames, frames, dtype=np.float64)
    return (last - int(np.argmin((energy[:-1] + energy[1:])[::-1]))) * frame


# --- decoders


class Forward(soundfile.SoundFile):
    """Read from front to back. After every block soundfile else seeks to where it is, and decodes again for that."""

    def seekable(self) -> bool:
        return False


def _decode(sound: Sound, longest: float, stack: ExitStack) -> tuple[int, Blocks]:
    """-> the recording's own rate in Hz, and float32 [samples, channels] blocks, to be read before `stack` closes."""
    if not 0 <= sound.start < (sound.end or math.inf) or sound.end == math.inf:
        raise BadAudio(f"bad segment: {sound.start:g} s to {sound.end:g} s")
    file, name = open_sound(sound, stack)
    if name.lower().endswith(".g722"):  # headerless: only the name tells what it is
        return _decode_av(file, "g722", sound, stack)
    container = _examined(sound, file)
    if container.patch:
        file = patched(file, container.patch)
    first: Exception | None = None
    if container.trusted:
        try:
            decoder = open_decoder(sound, file, container, stack)
            if decoder.channels <= 2:  # ffmpeg knows what the channels are
                return _decode_soundfile(decoder, sound, longest)
        except BadAudio:
            raise
        except Exception as error:  # not a format of libsndfile's
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
    """The container of a recording; of one that is cut into segments, which come one after the other, only once."""
    global _last
    if not sound.start and not sound.end:
        return examine(file)
    stat = os.stat(sound.path)
    key = (sound.path, sound.offset, sound.size, sound.row, sound.column, stat.st_mtime_ns, stat.st_size)
    if _last[0] != key:
        _last = key, examine(file)
    return _last[1]


_last: tuple[Any, Container] = None, Container()


def open_decoder(sound: Sound, file: BinaryIO, container: Container, stack: ExitStack) -> Forward:
    """The recording in libsndfile. Raises BadAudio for a bad rate, and libsndfile's own errors for what it cannot
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
    if count > longest * rate:  # before decoding: a small file can unpack to hours
        raise BadAudio(f"too long: {count / rate:.1f} s; the limit is {longest:g} s")
    return rate, _soundfile_blocks(decoder, begin, count)


def _soundfile_blocks(decoder: Forward, begin: int, count: int) -> Blocks:
    if begin:
        decoder.seek(begin)
    step = max(1, BLOCK // decoder.channels)
    # The same values: libsndfile's own conversion takes as long as half the resampling.
    dtype = "int16" if (decoder.format, decoder.subtype) == ("WAV", "PCM_16") else "float32"
    while count > 0:
        block = decoder.read(min(step, count), dtype=dtype, always_2d=True)
        if len(block) == 0:
            raise BadAudio(CUT)
        count -= len(block)
        yield block if dtype == "float32" else np.multiply(block, np.float32(2**-15), dtype=np.float32)


def _decode_av(file: BinaryIO, format: str | None, sound: Sound, stack: ExitStack) -> tuple[int, Blocks]:
    # No protocol is allowed: a playlist in disguise opens neither network addresses nor other files.
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
    at, held, layout = -1, 0, ""  # `at` counts from the recording's beginning
    for frame in _frames(container, stream):
        if frame.sample_rate != rate or (layout and frame.layout.name != layout):
            raise BadAudio("its sample rate or channels change on the way")
        if not layout:
            layout, weights = frame.layout.name, _downmix([channel.name for channel in frame.layout.channels])
        if at < 0:
            if jump and frame.pts is None:
                raise BadAudio("bad segment: the recording has no time stamps to find it by")
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
    """The decoded frames. MPEG audio may begin in a frame that is not there, as where two files were put together: such
    a frame is left out, as every player does."""
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
    """Seconds that the file says it has; 0 where it says nothing, and ffmpeg guesses."""
    if not DECLARING & set(container.format.name.split(",")):
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / av.time_base


def _downmix(channels: list[str]) -> np.ndarray | None:
    """float32 [channels, 1]: the weights of surround sound in mono, or None where the mean is right. Speech is in the
    centre; the mean over six channels would leave a sixth of it. Unlabelled channels are a film's if there are six or
    eight of them, as every player takes them; else microphones."""
    if len(channels) in (6, 8) and set(channels) == {"NONE"}:
        channels = ["FL", "FR", "FC", "LFE", *["BL", "BR", "SL", "SR"][: len(channels) - 4]]
    if len(channels) <= 2 or "FC" not in channels:
        return None
    weights = {"FC": 1.0, "FL": 0.5, "FR": 0.5, "LFE": 0.0}  # left and right as in the mean of stereo
    return np.array([[weights.get(name, math.sqrt(0.125))] for name in channels], np.float32)


# --- reasons


@contextmanager
def reasons() -> Iterator[None]:
    """Turns what decoders raise into BadAudio: they fail in many ways on damaged bytes, and a worker must go on."""
    try:
        yield
    except (BadAudio, SodaError):
        raise
    except Exception as error:
        raise BadAudio(f"cannot be read: {_why(error)}") from error


def _why(error: Exception) -> str:
    """A decoder's own words, without the path."""
    words = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return f"{type(error).__name__}: {words}"


def _check_rate(rate: int) -> None:
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise BadAudio(f"bad sample rate: {rate} Hz")
