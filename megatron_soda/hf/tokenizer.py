"""The tokenizer of an export: the text tokenizer with the markers and an added token for every audio code.

Audio codes are characters from U+E000 on, as in SODA's released corpora, so a document is a plain string.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ..tokenizer import TextTokenizer
from ..vocab import BOS, EOS, FIRST_AUDIO_CHARACTER, MARKERS, TokenSpace


def document_string(ids: np.ndarray, space: TokenSpace, text: TextTokenizer) -> str:
    """One document of ids as SODA writes it: markers, text, and a character for every code."""
    parts, run = [], []
    special = {space.bos: BOS, space.eos: EOS} | {space.text_size + i: m for i, m in enumerate(MARKERS)}
    for token in [*map(int, ids), None]:
        if token is not None and token < space.text_size and token not in special:
            run.append(token)
            continue
        if run:
            parts.append(text.decode(run))
            run = []
        if token is not None:
            parts.append(special.get(token) or chr(FIRST_AUDIO_CHARACTER + token - space.audio_base))
    return "".join(parts)


def build_tokenizer(text: TextTokenizer, space: TokenSpace) -> Tokenizer:
    """A fast tokenizer whose ids are those of `space`. Like SODA's it puts BOS before what it encodes."""
    tokenizer = Tokenizer.from_file(str(text.path)) if text.path.suffix == ".json" else _from_sentencepiece(text)
    audio = (chr(FIRST_AUDIO_CHARACTER + i) for i in range(space.codebooks * space.entries))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, *MARKERS)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in audio])
    assert tokenizer.token_to_id(MARKERS[0]) == space.text_start
    assert tokenizer.get_vocab_size() == space.size
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, space.bos)]
    )
    return tokenizer


def save_tokenizer(text: TextTokenizer, space: TokenSpace, folder: Path, max_length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(text, space),
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _from_sentencepiece(text: TextTokenizer) -> Tokenizer:
    """The same unigram model in the tokenizers library."""
    model = text.sentencepiece
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
