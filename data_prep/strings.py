"""Documents as strings, the form in which SODA's corpora are released: markers, text, and a character per audio code.

    <|begin_of_text|><|text_start|>..<|text_end|><|audio_start|>..<|audio_end|>..<|end_of_text|>

Many are read at once: numpy finds markers and audio in the code points of a whole group of documents, and each text is
tokenised once however often it occurs. Illegal documents are detected there too, but explained one by one, by the
grammar itself.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from megatron_soda.tokenizer import TextTokenizer
from megatron_soda.tokenizer import document_string as to_string
from megatron_soda.vocab import (
    AUDIO_END,
    AUDIO_START,
    BOS,
    BOS_KIND,
    EOS,
    EOS_KIND,
    FIRST_AUDIO_CHARACTER,
    FIRST_CODE,
    MARKERS,
    TEXT,
    TEXT_END,
    TEXT_START,
    Grammar,
    TokenSpace,
)

__all__ = ["to_ids", "to_string"]

CHARACTERS_AT_ONCE = 2**17  # so that a group's arrays stay in a core's cache
SPELLINGS = (BOS, EOS, *MARKERS)
KINDS = np.array([BOS_KIND, EOS_KIND, TEXT_START, TEXT_END, AUDIO_START, AUDIO_END])
LENGTHS = np.array([len(spelling) for spelling in SPELLINGS])
LONGEST = int(LENGTHS.max())
_ITEM = re.compile("|".join(map(re.escape, SPELLINGS)) + "|.", re.DOTALL)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
Document = np.ndarray | str  # int32 ids, or the reason there are none


def to_ids(
    strings: Sequence[str], space: TokenSpace, tokenizer: TextTokenizer, corpus_codebooks: int = 0
) -> list[Document]:
    """For each document its ids, int32 (tokens,), or a string that says what is wrong with it and at which character.

    `corpus_codebooks` is the number of codebooks in the strings' frames; 0: as many as in `space`. If there are more,
    the first ones are used; if fewer (1: a semantic-only corpus), the documents have shorter frames. A document gets
    ids exactly if it is legal: `space.check(ids, slots)` is None, where `slots` is the smaller of the two numbers. Text
    is kept as it is, but must not contain characters that stand for codes (see `clean_text`). The ids of a group of
    documents share memory. Never raises, whatever the strings.
    """
    reader = _Reader(space, tokenizer, corpus_codebooks or space.codebooks)
    return [document for group in _groups(strings) for document in reader.read(group)]


def _groups(strings: Sequence[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for string in strings:
        group.append(string)
        size += len(string)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _following() -> np.ndarray:
    """bool (kind, next kind, whether anything is between them): which markers may follow one another."""
    legal = np.zeros((FIRST_CODE, FIRST_CODE, 2), bool)
    for start, end in ((BOS_KIND, EOS_KIND), (TEXT_START, TEXT_END), (AUDIO_START, AUDIO_END)):
        legal[start, end, 1] = True
    for before in (BOS_KIND, TEXT_END, AUDIO_END):
        legal[before, [TEXT_START, AUDIO_START], 0] = True
    legal[[TEXT_END, AUDIO_END], EOS_KIND, 0] = True
    return legal


FOLLOWING = _following()


class _Reader:
    def __init__(self, space: TokenSpace, tokenizer: TextTokenizer, codebooks: int) -> None:
        self.space, self.tokenizer, self.codebooks = space, tokenizer, codebooks
        self.slots = min(codebooks, space.codebooks)
        self.written = TokenSpace(space.text_size, space.bos, space.eos, max(codebooks, space.codebooks), space.entries)
        ids = [0, space.bos, space.eos, space.text_start, space.text_end, space.audio_start, space.audio_end]
        self.marker_ids = np.array(ids, np.int32)  # by kind
        self.places = np.zeros(0, np.uint32)  # for codes in frames: entries * codebook, repeated
        self.texts: dict[str, np.ndarray] = {}

    def read(self, group: list[str]) -> list[Document]:
        # A character that occurs in no marker keeps markers from spanning two documents.
        joined = "\0".join(group) + "\0" * LONGEST
        try:
            points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError:
            return self._without(group, np.array([not _HALF_PAIR.search(string) for string in group]))
        lengths = np.fromiter(map(len, group), np.int64, len(group))
        starts = np.cumsum(lengths + 1) - lengths - 1
        begins, ends, kinds = _find_markers(points)
        document = np.searchsorted(starts, begins, "right") - 1
        offsets = points - np.uint32(FIRST_AUDIO_CHARACTER)  # before the first it wraps to a huge value
        runs, run_ends = _runs(offsets < self.written.codebooks * self.space.entries)

        good = _well_marked(begins, ends, kinds, document, starts, lengths)
        audio = np.flatnonzero((kinds == AUDIO_START) & good[document])
        good &= self._audio_in_place(ends[audio], begins[audio + 1], document[audio], runs, run_ends, starts)
        if not good.all():
            return self._without(group, good)

        sizes = begins[audio + 1] - ends[audio]
        spans = [offsets[i:j] for i, j in zip(ends[audio].tolist(), begins[audio + 1].tolist(), strict=True)]
        offsets = np.concatenate(spans) if spans else offsets[:0]
        wrong = self._out_of_order(offsets)
        if len(wrong):
            good[document[audio][np.searchsorted(np.cumsum(sizes), wrong, "right")]] = False
            return self._without(group, good)

        bare = (kinds[:-1] == BOS_KIND) & (kinds[1:] == EOS_KIND)
        text = np.flatnonzero((kinds[:-1] == TEXT_START) | bare)
        texts = self._text_ids([joined[i:j] for i, j in zip(ends[text], begins[text + 1], strict=True)])
        if not all(map(len, texts)):
            good[document[text][[len(ids) == 0 for ids in texts]]] = False
            return self._without(group, good)

        if self.slots < self.codebooks:
            offsets = offsets.reshape(-1, self.codebooks)[:, : self.slots].reshape(-1)
            sizes = sizes // self.codebooks * self.slots
        codes = (offsets + np.uint32(self.space.audio_base)).view(np.int32)
        tokens = np.ones(len(kinds), np.int64)  # by marker, what it opens
        tokens[audio] += sizes
        tokens[text] += np.fromiter(map(len, texts), np.int64, len(texts))
        places = np.cumsum(tokens) - tokens
        ids = np.empty(tokens.sum(), np.int32)
        ids[places] = self.marker_ids[kinds]
        after = np.cumsum(sizes)
        for place, i, j in zip((places[audio] + 1).tolist(), (after - sizes).tolist(), after.tolist(), strict=True):
            ids[place : place + j - i] = codes[i:j]
        for place, some in zip((places[text] + 1).tolist(), texts, strict=True):
            ids[place : place + len(some)] = some
        cuts = [*places[kinds == BOS_KIND].tolist(), len(ids)]
        return [ids[i:j] for i, j in pairwise(cuts)]

    def _without(self, group: list[str], good: np.ndarray) -> list[Document]:
        """Malformed documents are rare: they are explained, and the rest is read again without them."""
        rest = [string for string, is_good in zip(group, good, strict=True) if is_good]
        read = iter(self.read(rest) if rest else ())
        return [next(read) if is_good else self._why(string) for string, is_good in zip(group, good, strict=True)]

    def _audio_in_place(
        self,
        begins: np.ndarray,
        ends: np.ndarray,
        document: np.ndarray,
        runs: np.ndarray,
        run_ends: np.ndarray,
        starts: np.ndarray,
    ) -> np.ndarray:
        """bool (documents,): each audio span is one run of audio characters in whole frames, and there are no other
        runs."""
        in_spans = np.bincount(document, minlength=len(starts))
        in_all = np.bincount(np.searchsorted(starts, runs, "right") - 1, minlength=len(starts))
        good = in_spans == in_all
        if len(runs):
            run = np.minimum(np.searchsorted(runs, begins), len(runs) - 1)
            is_run = (runs[run] == begins) & (run_ends[run] == ends) & ((ends - begins) % self.codebooks == 0)
            good[document[~is_run]] = False
        return good

    def _out_of_order(self, offsets: np.ndarray) -> np.ndarray:
        """Indices of the characters in whole frames that are not codes of the codebook expected at their position."""
        if len(offsets) > len(self.places):
            one = np.arange(self.codebooks, dtype=np.uint32) * np.uint32(self.space.entries)
            self.places = np.tile(one, len(offsets) // self.codebooks)
        codes = offsets - self.places[: len(offsets)]
        if not len(codes) or codes.max() < self.space.entries:
            return np.zeros(0, np.int64)
        return np.flatnonzero(codes >= self.space.entries)

    def _text_ids(self, texts: list[str]) -> list[np.ndarray]:
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        for text, ids in zip(new, self.tokenizer.encode_batch(new), strict=True):
            self.texts[text] = np.array(ids, np.int32)
        return [self.texts[text] for text in texts]

    def _why(self, string: str) -> str:
        """The grammar's answer, character by character."""
        grammar = Grammar(self.written, self.codebooks)
        state, text_at = Grammar.START, 0
        for item in _ITEM.finditer(string):
            at, spelling = item.start(), item[0]
            code = ord(spelling) - FIRST_AUDIO_CHARACTER if len(spelling) == 1 else -1
            if _HALF_PAIR.match(spelling):
                return f"character {at}: half a surrogate pair, which is no Unicode"
            if len(spelling) > 1:
                kind = int(KINDS[SPELLINGS.index(spelling)])
            elif 0 <= code < self.written.codebooks * self.space.entries:
                kind = FIRST_CODE + code // self.space.entries
            else:
                kind = TEXT
            if state in (Grammar.OPEN, Grammar.TEXT_FIRST):
                text_at = at
            following = grammar.step.get((state, kind))
            if following is None and kind == TEXT and state >= Grammar.FRAME_FIRST:
                return f"character {at}: U+{ord(spelling):04X} is no code of {self.written.codebooks} codebooks"
            if following is None:
                return f"character {at}: {grammar.name(kind)} is not legal {grammar.where(state)}"
            state = following
        if state != Grammar.END:
            return f"character {len(string)}: the document ends {grammar.where(state)}"
        return f"character {text_at}: the tokenizer has no ids for this text"


def _find_markers(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where markers begin and end, and their kinds. The last LONGEST points must not belong to a marker."""
    at = np.flatnonzero(points == ord("<"))
    at = at[points[at + 1] == ord("|")]
    windows = points[at[:, None] + np.arange(LONGEST)]
    which = np.full(len(at), -1)
    for i, spelling in enumerate(SPELLINGS):
        letters = np.frombuffer(spelling.encode("utf-32-le"), np.uint32)
        which[(windows[:, : len(letters)] == letters).all(1)] = i
    at, which = at[which >= 0], which[which >= 0]
    return at, at + LENGTHS[which], KINDS[which]


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of True begin and end. The last flag must be False."""
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    if len(flags) and flags[0]:
        edges = np.concatenate([[0], edges])
    return edges[::2], edges[1::2]


def _well_marked(
    begins: np.ndarray,
    ends: np.ndarray,
    kinds: np.ndarray,
    document: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """bool (documents,): whether the markers form a legal document, with content between them where required."""
    numbers = np.arange(len(starts))
    first, last = np.searchsorted(document, numbers), np.searchsorted(document, numbers, "right") - 1
    good = last > first
    first, last, some = first[good], last[good], np.flatnonzero(good)
    good[some] = (begins[first] == starts[some]) & (kinds[first] == BOS_KIND)
    good[some] &= (ends[last] == starts[some] + lengths[some]) & (kinds[last] == EOS_KIND)
    legal = FOLLOWING[kinds[:-1], kinds[1:], (begins[1:] > ends[:-1]).astype(np.int8)]
    good[document[:-1][~legal & (document[1:] == document[:-1])]] = False
    return good
