"""Builds documents from utterances, exactly as SODA writes them (paper, section 2).

    text-first      BOS (TEXT_START text TEXT_END AUDIO_START audio AUDIO_END)+ EOS
    audio-first     BOS (AUDIO_START audio AUDIO_END TEXT_START text TEXT_END)+ EOS
    audio-only      BOS (AUDIO_START audio AUDIO_END)+ EOS
    semantic-only   the same with codebook 0 alone
    text-only       BOS text EOS
    asr audio-first only
    tts text-first, each text preceded by "[0]"
    conversational text-first, each text preceded by its speaker's number in the recording, "[0]", "[1]"
    translation from two utterances, the original and its translation: BOS AUDIO_START source AUDIO_END TEXT_START
                    <language>xx</language>text TEXT_END TEXT_START <language>yy</language>text TEXT_END AUDIO_START
                    target AUDIO_END EOS; without the target's audio span if it has no sound

A document is first planned as parts (a text, or the audio of utterance i), so that each text is tokenised only once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_soda.vocab import TokenSpace

Part = str | int | tuple[str]  # a text span, the audio of an utterance, bare text
Plan = list[Part]
Utterances = Iterable[tuple[list[int], np.ndarray]]  # text ids, codes (frames, codebooks)


class Spoken(Protocol):
    """What a plan needs to know about an utterance."""

    @property
    def text(self) -> str: ...
    @property
    def language(self) -> str: ...
    @property
    def speaker(self) -> str: ...
    @property
    def heard(self) -> bool: ...


class CannotPlan(ValueError):  # noqa: N818  (becomes a Reject)
    """Why no such document can be made from these utterances."""


def _text(spoken: Spoken, before: str = "") -> str:
    if not spoken.text:
        raise CannotPlan("no transcript")
    return before + spoken.text


def _text_first(spoken: Sequence[Spoken]) -> Plan:
    return [part for i, s in enumerate(spoken) for part in (_text(s), i)]


def _audio_first(spoken: Sequence[Spoken]) -> Plan:
    return [part for i, s in enumerate(spoken) for part in (i, _text(s))]


def _audio_only(spoken: Sequence[Spoken]) -> Plan:
    return list(range(len(spoken)))


def _text_only(spoken: Sequence[Spoken]) -> Plan:
    return [(" ".join(_text(s) for s in spoken),)]


def _tts(spoken: Sequence[Spoken]) -> Plan:
    return [part for i, s in enumerate(spoken) for part in (_text(s, "[0]"), i)]


def _conversational(spoken: Sequence[Spoken]) -> Plan:
    if len(spoken) > 1 and not all(s.speaker for s in spoken):
        raise CannotPlan("no speaker: a conversation needs one for every utterance")
    numbers: dict[str, int] = {}
    plan: Plan = []
    for i, s in enumerate(spoken):
        plan += [_text(s, f"[{numbers.setdefault(s.speaker, len(numbers))}]"), i]
    return plan


def _translation(spoken: Sequence[Spoken]) -> Plan:
    if len(spoken) != 2:
        raise CannotPlan(f"no pair: a recording of {len(spoken)} utterances; a translation needs two")
    if not all(s.language for s in spoken):
        raise CannotPlan("no language")
    if not spoken[0].heard:
        raise CannotPlan("no codes: of the source")
    source, target = (_text(s, f"<language>{s.language}</language>") for s in spoken)
    return [0, source, target, 1] if spoken[1].heard else [0, source, target]


ORDERS: dict[str, Callable[[Sequence[Spoken]], Plan]] = {
    "text-first": _text_first,
    "audio-first": _audio_first,
    "audio-only": _audio_only,
    "semantic-only": _audio_only,
    "text-only": _text_only,
    "asr": _audio_first,
    "tts": _tts,
    "conversational": _conversational,
    "translation": _translation,
}


WITHOUT_TEXT = {"audio-only", "semantic-only"}


def needs_text(orders: Iterable[str]) -> bool:
    """Whether an utterance without a transcript is useless because all these orders write text."""
    return WITHOUT_TEXT.isdisjoint(orders)


def texts_of(plan: Plan) -> list[str]:
    return [part if isinstance(part, str) else part[0] for part in plan if not isinstance(part, int)]


def document(
    plan: Plan, text_ids: dict[str, np.ndarray], audio_ids: Sequence[np.ndarray], space: TokenSpace
) -> np.ndarray:
    """int32: the ids of a planned document. `text_ids` holds the ids of every text, `audio_ids` those of every
    utterance."""
    ids: list[Any] = [[space.bos]]
    for part in plan:
        if isinstance(part, int):
            ids += [[space.audio_start], audio_ids[part], [space.audio_end]]
        elif isinstance(part, str):
            ids += [[space.text_start], text_ids[part], [space.text_end]]
        else:
            ids.append(text_ids[part[0]])
    return np.concatenate([*ids, [space.eos]], dtype=np.int32, casting="same_kind")


def text_first(utterances: Utterances, space: TokenSpace) -> np.ndarray:
    return _of_codes(utterances, True, space)


def audio_first(utterances: Utterances, space: TokenSpace) -> np.ndarray:
    return _of_codes(utterances, False, space)


def text_only(text: list[int] | np.ndarray, space: TokenSpace) -> np.ndarray:
    return document([("",)], {"": np.asarray(text, np.int32)}, [], space)


def _of_codes(utterances: Utterances, text_is_first: bool, space: TokenSpace) -> np.ndarray:
    texts, audio, plan = {}, [], []
    for i, (text, codes) in enumerate(utterances):
        texts[str(i)] = np.asarray(text, np.int32)
        audio.append(space.audio_ids(codes))
        plan += [str(i), i] if text_is_first else [i, str(i)]
    return document(plan, texts, audio, space)
