"""The text tokenizer: a sentencepiece model or a Hugging Face tokenizer.json, behind one class."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import SodaError
from .files import atomic_path
from .vocab import BOS, EOS, TokenSpace


class TextTokenizer:
    """Text to ids and back. BOS and EOS must be in it, as <|begin_of_text|> and <|end_of_text|>.

    Markers inside a text are plain text to it: no transcript can forge structure.
    Raises SodaError for a file that is neither format, or that lacks BOS or EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise SodaError(f"{path}: no such tokenizer (a sentencepiece .model or a tokenizer.json)")
        self.fingerprint = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        self._is_json = self.path.suffix == ".json"
        try:
            if self._is_json:
                from tokenizers import Tokenizer

                self._model: Any = Tokenizer.from_file(str(self.path))
                self._model.encode_special_tokens = True
                self._model.no_padding()
                self._model.no_truncation()
                self.size = self._model.get_vocab_size(with_added_tokens=True)
                ids = [self._model.token_to_id(BOS), self._model.token_to_id(EOS)]
            else:
                import sentencepiece

                self._model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
                self.size = self._model.get_piece_size()
                ids = [self._model.piece_to_id(piece) for piece in (BOS, EOS)]
                ids = [None if i == self._model.unk_id() else i for i in ids]
        except Exception as error:  # both libraries raise bare exceptions
            raise SodaError(f"{path}: neither a sentencepiece model nor a tokenizer.json ({error})") from None
        if None in ids:
            raise SodaError(f"{path}: the tokenizer has no {BOS} or no {EOS}; add them as special tokens")
        self.bos, self.eos = (int(i) for i in ids if i is not None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        if self._is_json:
            return self._model.encode(text, add_special_tokens=False).ids
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        return self._model.decode(ids, skip_special_tokens=False) if self._is_json else self._model.decode(ids)

    @property
    def sentencepiece(self) -> Any:
        """The sentencepiece processor. ValueError for a tokenizer.json."""
        if self._is_json:
            raise ValueError(f"{self.path} is not a sentencepiece model")
        return self._model

    def space(self, codebooks: int, entries: int) -> TokenSpace:
        return TokenSpace(self.size, self.bos, self.eos, codebooks, entries)


def data_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer of a data folder."""
    found = sorted(folder.glob("text_tokenizer.model")) + sorted(folder.glob("text_tokenizer.json"))
    if not found:
        raise SodaError(f"{folder}: no tokenizer in it; is it a data folder that `soda prepare` made?")
    return TextTokenizer(found[0])


def train_sentencepiece(path: Path, sentences: Iterable[str], pieces: int) -> None:
    """Trains a unigram sentencepiece model with byte fallback on `sentences` and writes it to `path`.

    Raises SodaError if the text cannot carry that many pieces.
    """
    import sentencepiece

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=file,
                vocab_size=pieces,
                model_type="unigram",
                character_coverage=0.9995,
                byte_fallback=True,  # any text can be written
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                hard_vocab_limit=False,  # little text gives fewer pieces
                bos_piece=BOS,
                eos_piece=EOS,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise SodaError(
                f"cannot train a tokenizer of {pieces} pieces on these transcripts ({error}). "
                "Set prepare.text_pieces lower, or give more text (prepare.text)."
            ) from None
