"""The prompts of the tasks, as the paper's evaluation scripts write them (sections 8 to 10 of its protocol)."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_soda.errors import SodaError
from megatron_soda.inference.sample import Constraint
from megatron_soda.inference.task import Material, Prompt
from megatron_soda.registry import TASKS
from tests.helpers import SPACE as S

CODES = np.arange(40).reshape(10, 4).astype(np.int16) % 16
AUDIO = [S.audio_base + 16 * k + int(code) for frame in CODES for k, code in enumerate(frame)]
TEXTS = {"hello": [5, 6], "good morning": [9], "hola": [7], "<language>es</language>": [11, 12]}
TEXTS |= {"<language>en</language>": [11, 13], "<language>es</language>hola": [11, 12, 7]}
TEXTS |= {"<language>en</language>hello": [11, 13, 5, 6]}
SOUND = [S.audio_start, *AUDIO, S.audio_end]
HELLO = [S.text_start, 5, 6, S.text_end]


def material(longest: int = 12, context: int = 160, text: str = "hello", **more: Any) -> Material:
    return Material(S, TEXTS.__getitem__, 2.5, context, longest, text, CODES, **more)


def legal(ids: list[int]) -> bool:
    return Constraint(S, torch.device("cpu")).follow(ids) is not None


def prompt(task: str, **more: Any) -> Prompt:
    made = TASKS[task].prompt(material(**more))
    assert legal(made.ids)
    return made


def test_transcribe_opens_a_text_behind_the_sound():
    made = prompt("transcribe", context=1000)
    assert made.ids == [S.bos, *SOUND, S.text_start]
    assert (made.stop, made.max_tokens, made.text, made.given) == ({S.text_end}, 200, None, 0)
    assert TASKS["transcribe"].needs_text
    assert TASKS["transcribe"].writes


def test_a_text_has_as_many_tokens_as_the_sound_may_have_letters():
    """The paper's 200, or 25 a second, or what the context has room for."""
    long = Material(S, TEXTS.__getitem__, 2.5, 9000, 12, codes=np.zeros((100, 4), np.int16))
    assert TASKS["transcribe"].prompt(long).max_tokens == 40 * 25
    assert prompt("transcribe", context=160).max_tokens == 160 - 44


@pytest.mark.parametrize(("said", "ids"), [("hello", [5, 6]), ("good morning", [9])])
def test_speak_opens_sound_behind_the_text(said, ids):
    made = prompt("speak", text=said, longest=100)
    assert made.ids == [S.bos, S.text_start, *ids, S.text_end, S.audio_start]
    assert (made.stop, made.text, made.given) == ({S.audio_end}, said, 0)
    # By the letters, at 2.5 frames a second: (2 s + 5 / 3 s), rounded up, and (2 s + 12 / 3 s); and two markers.
    assert made.max_tokens == {"hello": 10, "good morning": 15}[said] * 4 + 2
    assert TASKS["speak"].needs_text
    assert not TASKS["speak"].writes


def test_speak_in_a_voice():
    made = prompt("speak", text="good morning", voice=("hello", CODES))
    assert made.ids == [S.bos, *HELLO, *SOUND, S.text_start, 9, S.text_end, S.audio_start]


@pytest.mark.parametrize("given", [1, 2, 10])
def test_continue_gives_the_first_frames(given):
    made = prompt("continue", given=given)
    assert made.ids == [S.bos, S.audio_start, *AUDIO[: 4 * given]]
    assert (made.stop, made.text, made.given) == ({S.audio_end}, None, given)
    assert made.max_tokens == (12 - given) * 4 + 2
    assert not TASKS["continue"].needs_text
    assert not TASKS["continue"].writes


def test_translate_goes_by_way_of_both_texts():
    task, given = TASKS["translate"], material(to="en", context=400, longest=100)
    first = task.prompt(given)
    assert first.ids == [S.bos, *SOUND, S.text_start]
    assert first.stop == {S.text_end}
    heard = [*first.ids, 11, 12, 7, S.text_end]
    second = task.then(given, first, heard, "<language>es</language>hola")
    assert second
    assert second.ids == [*heard, S.text_start, 11, 13]
    assert second.stop == {S.text_end}
    written = [*second.ids, 5, 6, S.text_end]
    third = task.then(given, second, written, "hello")
    assert third
    assert third.ids == [*written, S.audio_start]
    assert (third.stop, third.max_tokens, third.text) == ({S.audio_end}, 10 * 4 + 2, "hello")
    assert legal(third.ids)
    assert task.then(given, third, [*third.ids, *AUDIO, S.audio_end], "") is None
    assert prompt("translate", to="en", language="es", context=400).ids == [*first.ids, 11, 12]
    with pytest.raises(SodaError, match="--to LANG"):
        prompt("translate")


@pytest.mark.parametrize("context", [60, 69, 70, 100, 400])
def test_a_translation_that_is_begun_has_room_to_its_end(context):
    """However long its texts become, or it is refused at once."""
    task, given = TASKS["translate"], material(to="en", context=context, longest=100)
    try:
        made = task.prompt(given)
    except SodaError:
        assert context < 70
        return
    assert context >= 70
    for _ in range(2):
        ids = [*made.ids, *[5] * (made.max_tokens - 1), S.text_end]
        more = task.then(given, made, ids, "hello" * 20)
        assert more
        made = more
    assert made.stop == {S.audio_end}
    assert len(made.ids) + made.max_tokens <= context


def test_examples_are_documents_in_front():
    """Each a whole document, in the order of its task's prompt."""
    whole = {
        "transcribe": [S.bos, *SOUND, *HELLO, S.eos],
        "speak": [S.bos, *HELLO, *SOUND, S.eos],
        "continue": [S.bos, *SOUND, S.eos],
    }
    for task, document in whole.items():
        assert TASKS[task].example(material()) == document
        plain, shot = prompt(task, given=3, context=400), prompt(task, given=3, context=400, examples=(*document,) * 2)
        assert shot.ids == [*document, *document, *plain.ids]
        assert shot.max_tokens == plain.max_tokens
    shot = material(text="hola", language="es", to="en", translation=("hello", CODES[:1]))
    document = TASKS["translate"].example(shot)
    spoken = [S.audio_start, *AUDIO[:4], S.audio_end]
    texts = [S.text_start, 11, 12, 7, S.text_end, S.text_start, 11, 13, 5, 6, S.text_end]
    assert document == [S.bos, *SOUND, *texts, *spoken, S.eos]
    assert S.check(np.array(document)) is None
    given = material(to="en", context=800, examples=tuple(document))
    first = TASKS["translate"].prompt(given)
    second = TASKS["translate"].then(given, first, [*first.ids, 7, S.text_end], "hola")
    assert second
    assert second.ids[-3:] == [S.text_start, 11, 13]


def test_the_limits_of_speech():
    assert prompt("speak", longest=7).max_tokens == 7 * 4 + 2
    assert prompt("speak", longest=100, context=5 + 2 + 4 * 4 + 3, text="good morning").max_tokens == 4 * 4 + 2


@pytest.mark.parametrize("task", ["speak", "transcribe", "continue", "translate"])
def test_no_room_is_said(task):
    with pytest.raises(SodaError, match=r"the prompt's \d+ tokens leave no room .* context of 10 tokens"):
        prompt(task, context=10, given=10, to="en")
