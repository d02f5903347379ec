"""The prompts of the tasks, as the paper's evaluation scripts write them (sections 8 and 10 of its protocol)."""

import numpy as np
import pytest
import torch

from megatron_soda.config.use import Generate
from megatron_soda.errors import SodaError
from megatron_soda.inference.sample import Constraint
from megatron_soda.inference.task import Material, Prompt
from megatron_soda.registry import TASKS
from tests.helpers import SPACE

CODES = np.arange(40).reshape(10, 4).astype(np.int16) % 16
AUDIO = [SPACE.audio_base + 16 * k + int(code) for frame in CODES for k, code in enumerate(frame)]
TEXTS = {"hello": [5, 6], "good morning": [9]}


def prompt(task: str, longest: int = 12, context: int = 160, **settings) -> Prompt:
    row = {"codes": CODES, "text": "hello", "id": "u", "language": "en"}
    made = TASKS[task].prompt(Material(row, SPACE, TEXTS.__getitem__, longest, 2.5, Generate(**settings), context))
    assert Constraint(SPACE, torch.device("cpu")).follow(made.ids) is not None
    return made


def test_transcribe_opens_a_text_behind_the_sound():
    made = prompt("transcribe")
    assert made.ids == [SPACE.bos, SPACE.audio_start, *AUDIO, SPACE.audio_end, SPACE.text_start]
    assert (made.stop, made.max_tokens, made.text, made.given) == ({SPACE.text_end}, 200, None, 0)
    assert TASKS["transcribe"].needs_text
    assert TASKS["transcribe"].writes


@pytest.mark.parametrize(("own", "said", "ids"), [("", "hello", [5, 6]), ("good morning", "good morning", [9])])
def test_speak_opens_sound_behind_the_text(own, said, ids):
    made = prompt("speak", text=own)
    assert made.ids == [SPACE.bos, SPACE.text_start, *ids, SPACE.text_end, SPACE.audio_start]
    assert (made.stop, made.text, made.given) == ({SPACE.audio_end}, said, 0)
    # By the letters, at 2.5 frames a second: (2 s + 5 / 3 s), rounded up, and (2 s + 12 / 3 s); and two markers.
    assert made.max_tokens == {"hello": 10, "good morning": 15}[said] * 4 + 2
    assert TASKS["speak"].needs_text
    assert not TASKS["speak"].writes


@pytest.mark.parametrize(("seconds", "given"), [(0.01, 1), (1.0, 2), (1.3, 3), (100.0, 5)])
def test_continue_gives_the_first_frames(seconds, given):
    """At 2.5 frames a second: at least one, at most half of the utterance."""
    made = prompt("continue", prompt_seconds=seconds)
    assert made.ids == [SPACE.bos, SPACE.audio_start, *AUDIO[: 4 * given]]
    assert (made.stop, made.text, made.given) == ({SPACE.audio_end}, None, given)
    assert made.max_tokens == (12 - given) * 4 + 2
    assert not TASKS["continue"].needs_text
    assert not TASKS["continue"].writes


def test_the_limits_of_speech():
    """A held-out text has at most the longest utterance, one's own what the context leaves."""
    assert prompt("speak", longest=7).max_tokens == 7 * 4 + 2
    assert prompt("speak", longest=7, text="good morning").max_tokens == 15 * 4 + 2
    assert prompt("speak", context=5 + 2 + 4 * 4 + 3, text="good morning").max_tokens == 4 * 4 + 2
    with pytest.raises(SodaError, match=r"generate\.text: with its 1 tokens there is no room .* of 10 tokens"):
        prompt("speak", context=10, text="good morning")
