"""The token space, the only file that deals in token ids: text first, four markers, then the audio codes by codebook.

    [0, text_size) text ids of the text tokenizer, including its BOS and EOS text_size + 0..3 <|text_start|>
    <|text_end|> <|audio_start|> <|audio_end|> text_size + 4 + entries * k + c code c of codebook k

With Llama-3's 128,256 text ids and Mimi's first 8 codebooks of 2,048 these are SODA's released ids (144,644 in all).

A document is BOS, then either bare text or one or more spans, then EOS. A text span is text between its markers, an
audio span is whole frames (codebook 0, 1, .. in order) between its markers. Neither is empty.
"""

from dataclasses import asdict, dataclass

import numpy as np

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
MARKERS = ("<|text_start|>", "<|text_end|>", "<|audio_start|>", "<|audio_end|>")
FIRST_AUDIO_CHARACTER = 0xE000  # code c of codebook k is written chr(0xE000 + entries * k + c) in SODA's corpora

# A token's kind in the grammar: finer than its class, because each marker has its own role.
TEXT, BOS_KIND, EOS_KIND, TEXT_START, TEXT_END, AUDIO_START, AUDIO_END, FIRST_CODE = range(8)


@dataclass(frozen=True)
class TokenSpace:
    """The sizes that determine every id. `bos` and `eos` are text ids."""

    text_size: int
    bos: int
    eos: int
    codebooks: int = 8
    entries: int = 2048

    @property
    def text_start(self) -> int:
        return self.text_size

    @property
    def text_end(self) -> int:
        return self.text_size + 1

    @property
    def audio_start(self) -> int:
        return self.text_size + 2

    @property
    def audio_end(self) -> int:
        return self.text_size + 3

    @property
    def audio_base(self) -> int:
        return self.text_size + len(MARKERS)

    @property
    def size(self) -> int:
        """Number of ids, without padding."""
        return self.audio_base + self.codebooks * self.entries

    @property
    def sections(self) -> list[int]:
        """Where the text with the markers begins, then each codebook, and where the last one ends."""
        return [0, *range(self.audio_base, self.size, self.entries), self.size]

    # ---- codes

    def audio_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes (frames, codebooks) -> int32 ids, frame-major, (frames * codebooks,)."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codebooks:
            raise ValueError(f"codes must be (frames, {self.codebooks}), not {codes.shape}")
        if codes.size and (codes.min() < 0 or codes.max() >= self.entries):
            raise ValueError(f"codes must lie in [0, {self.entries}), found {codes.min()} to {codes.max()}")
        offsets = (self.audio_base + self.entries * np.arange(self.codebooks)).astype(np.int32)
        return np.add(codes, offsets, dtype=np.int32, casting="unsafe").reshape(-1)

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Inverse of `audio_ids`: ids of whole frames -> int16 codes (frames, codebooks)."""
        offsets = self.audio_base + self.entries * np.arange(self.codebooks)
        codes = np.asarray(ids, dtype=np.int64).reshape(-1, self.codebooks) - offsets
        if codes.size and (codes.min() < 0 or codes.max() >= self.entries):
            raise ValueError("the ids are not whole audio frames")
        return codes.astype(np.int16)

    # ---- classes, by which losses are reported

    @property
    def class_names(self) -> list[str]:
        """Class 0 text, 1 marker (BOS and EOS are markers too), 2 + k codebook k."""
        return ["text", "marker", "semantic"] + [f"acoustic_{k}" for k in range(1, self.codebooks)]

    def class_table(self) -> np.ndarray:
        """uint8 (size,): the class of every id."""
        table = np.zeros(self.size, np.uint8)
        table[[self.bos, self.eos]] = 1
        table[self.text_size : self.audio_base] = 1
        table[self.audio_base :] = np.repeat(np.arange(2, 2 + self.codebooks), self.entries)
        return table

    # ---- grammar

    def kind_table(self) -> np.ndarray:
        """int8 (size,): TEXT, BOS_KIND, .. or FIRST_CODE + k for every id."""
        table = np.zeros(self.size, np.int8)
        table[self.bos], table[self.eos] = BOS_KIND, EOS_KIND
        table[self.text_size : self.audio_base] = (TEXT_START, TEXT_END, AUDIO_START, AUDIO_END)
        table[self.audio_base :] = FIRST_CODE + np.repeat(np.arange(self.codebooks), self.entries)
        return table

    def check(self, ids: np.ndarray, slots: int = 0) -> str | None:
        """None if `ids` is one complete document, otherwise what is wrong with it and at which token. `slots`: see
        Grammar."""
        ids = np.asarray(ids)
        outside = np.flatnonzero((ids < 0) | (ids >= self.size))
        if len(outside):
            return f"token {outside[0]}: id {ids[outside[0]]} is out of range [0, {self.size})"
        state = Grammar.START
        kinds = self.kind_table()[ids]
        grammar = Grammar(self, slots)
        for position, kind in enumerate(kinds):
            following = grammar.step.get((state, int(kind)))
            if following is None:
                return f"token {position}: {grammar.name(int(kind))} is not legal {grammar.where(state)}"
            state = following
        return None if state == Grammar.END else f"token {len(ids)}: the document ends {grammar.where(state)}"

    # ---- identity

    def to_dict(self) -> dict:
        return asdict(self)


class Grammar:
    """The documents of a token space as a finite automaton over kinds.

    `step[state, kind]` is the next state; a missing key means an illegal token. Used both to check stores and to
    constrain decoding, so that they agree on what is valid. `slots`: codes per frame; 0: one per codebook; 1: the
    grammar of semantic-only documents.
    """

    START, OPEN, BARE, TEXT_FIRST, IN_TEXT, BETWEEN, END, FRAME_FIRST = range(8)  # then IN_FRAME + slot, slot >= 0

    def __init__(self, space: TokenSpace, slots: int = 0) -> None:
        self.space = space
        slots = slots or space.codebooks
        self.frame = [self.FRAME_FIRST + 1 + slot for slot in range(slots)]  # frame[0]: at a frame's edge
        step = {
            (self.START, BOS_KIND): self.OPEN,
            (self.OPEN, TEXT): self.BARE,
            (self.BARE, TEXT): self.BARE,
            (self.BARE, EOS_KIND): self.END,
            (self.TEXT_FIRST, TEXT): self.IN_TEXT,
            (self.IN_TEXT, TEXT): self.IN_TEXT,
            (self.IN_TEXT, TEXT_END): self.BETWEEN,
            (self.BETWEEN, EOS_KIND): self.END,
        }
        for state in (self.OPEN, self.BETWEEN):
            step[state, TEXT_START] = self.TEXT_FIRST
            step[state, AUDIO_START] = self.FRAME_FIRST
        for slot in range(slots):
            step[self.frame[slot], FIRST_CODE + slot] = self.frame[(slot + 1) % slots]
        step[self.FRAME_FIRST, FIRST_CODE] = self.frame[1 % slots]
        step[self.frame[0], AUDIO_END] = self.BETWEEN
        self.step = step
        self.states = self.FRAME_FIRST + 1 + slots

    def legal(self) -> np.ndarray:
        """bool (states, size): the ids that may follow in each state."""
        kinds = self.space.kind_table()
        mask = np.zeros((self.states, self.space.size), bool)
        for state, kind in self.step:
            mask[state] |= kinds == kind
        return mask

    def transitions(self) -> np.ndarray:
        """int64 (states, kinds): the state after a token of a kind, -1 where it is illegal. After the end of a document
        the next one may start."""
        table = np.full((self.states, FIRST_CODE + self.space.codebooks), -1)
        for (state, kind), following in self.step.items():
            table[state, kind] = following
        table[self.END] = table[self.START]
        return table

    def following(self) -> np.ndarray:
        """bool (kinds + 1, 2, kinds): which kinds may follow a token, as far as a window of documents shows it.

        The first index is the kind of the last token that is not text, or `kinds` where the window begins with text;
        the second, whether text came after it. After EOS comes the BOS of the next document.
        """
        kinds = FIRST_CODE + self.space.codebooks
        allowed = np.zeros((kinds + 1, 2, kinds), bool)
        for context in range(kinds + 1):
            states = set(range(self.states))
            if context < kinds:
                states = {following for (_, kind), following in self.step.items() if kind == context}
            if context == EOS_KIND:
                states = {self.START}
            in_text = {self.step[state, TEXT] for state in states if (state, TEXT) in self.step}
            for state, kind in self.step:
                allowed[context, 0, kind] |= state in states
                allowed[context, 1, kind] |= state in in_text
        return allowed

    def shortest_end(self) -> np.ndarray:
        """int (states,): the minimum number of tokens to the end of the document, including EOS."""
        distance = np.full(self.states, 10**9)
        distance[self.END] = 0
        for _ in range(self.states):
            for (state, _kind), following in self.step.items():
                distance[state] = min(distance[state], distance[following] + 1)
        return distance

    def name(self, kind: int) -> str:
        names = ["text", BOS, EOS, *MARKERS]
        return names[kind] if kind < FIRST_CODE else f"a code of codebook {kind - FIRST_CODE}"

    def where(self, state: int) -> str:
        names = {
            self.START: "at the start of a document",
            self.OPEN: f"right after {BOS}",
            self.BARE: "inside bare text",
            self.TEXT_FIRST: f"right after {MARKERS[0]}",
            self.IN_TEXT: "inside a text span",
            self.BETWEEN: "between spans",
            self.END: f"after {EOS}",
            self.FRAME_FIRST: f"right after {MARKERS[2]}",
        }
        return names.get(state, f"at slot {state - self.frame[0]} of an audio frame")


LLAMA3 = TokenSpace(text_size=128_256, bos=128_000, eos=128_001)  # SODA's released models and corpora
