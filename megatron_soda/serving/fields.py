"""The fields of requests, checked: OpenAI's, and ours."""

# pyright: reportMissingImports=false

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile

from ..errors import SodaError
from ..inference.own import Chance
from .answers import Continuation, Speech, Transcription
from .formats import TYPES

MOST_LETTERS = 4096  # of a text, as OpenAI has it


@dataclass(frozen=True)
class SoundOut:
    format: str
    events: bool  # server-sent events, instead of the file's bytes


def speech(body: Any) -> tuple[Speech, SoundOut]:
    if not isinstance(body, dict):
        raise SodaError("the request is not a JSON object")
    text = body.get("input")
    if not isinstance(text, str) or len(text) > MOST_LETTERS:
        raise SodaError(f"input must be a text of at most {MOST_LETTERS:,} letters")
    if body.get("speed") not in (None, 1, 1.0):
        raise SodaError("speed: the model speaks at its own speed; leave it out")
    if body.get("instructions"):
        raise SodaError("instructions: the model follows none; leave them out")
    said, voice = body.get("voice_text") or "", body.get("voice_audio")
    if not isinstance(said, str):
        raise SodaError("voice_text must be a text")
    return Speech(text, _chance(body), None if voice is None else _decoded(voice), said), _sound_out(body, "mp3")


async def transcription(form: FormData) -> tuple[Transcription, str, bool]:
    """The work, response_format, and whether to stream."""
    format = _one(form, "response_format", "json", ("json", "text"))
    stream = _one(form, "stream", "false", ("true", "false", "True", "False")).lower() == "true"
    if form.get("prompt"):
        raise SodaError("prompt: the model takes none; leave it out")
    return Transcription(await _file(form), _chance(form)), format, stream


async def continuation(form: FormData) -> tuple[Continuation, SoundOut]:
    seconds = _number(form, "seconds")
    if seconds is None or seconds <= 0:
        raise SodaError("seconds: how long the continuation may be, a number above 0")
    return Continuation(await _file(form), seconds, _chance(form)), _sound_out(form, "wav")


async def _file(form: FormData) -> bytes:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise SodaError("file: a sound file is needed, as multipart/form-data")
    return await file.read()


def _decoded(voice: Any) -> bytes:
    try:
        return base64.b64decode(voice, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise SodaError("voice_audio must be a sound file in base64") from None


def _sound_out(values: Any, usual: str) -> SoundOut:
    format = _one(values, "response_format", usual, tuple(TYPES))
    return SoundOut(format, _one(values, "stream_format", "audio", ("audio", "sse")) == "sse")


def _one(values: Any, key: str, usual: str, known: tuple[str, ...]) -> str:
    found = values.get(key) or usual
    if found not in known:
        raise SodaError(f"{key} must be one of {', '.join(known)}")
    return found


def _chance(values: Any) -> Chance:
    temperature, seed = _number(values, "temperature"), _number(values, "seed") or 0
    if temperature is not None and not 0 <= temperature <= 2:
        raise SodaError("temperature must be between 0 and 2")
    if seed != int(seed) or not 0 <= seed < 1 << 31:
        raise SodaError("seed must be a whole number from 0 to 2,147,483,647")
    return Chance(int(seed), temperature)


def _number(values: Any, key: str) -> float | None:
    found = values.get(key)
    if found is None or found == "":
        return None
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SodaError(f"{key} must be a number")
    return number
