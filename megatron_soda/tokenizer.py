"""The text tokenizer: a sentencepiece model or a Hugging Face tokenizer.json behind one class. Both run in the
tokenizers library, so that an exported tokenizer, the same engine with more tokens, cannot disagree. (sentencepiece
itself adds scores in single precision and breaks ties differently: one text in a thousand differs.)
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import SodaError
from .files import atomic_path, no_panic, reading, sha256, write_text
from .vocab import BOS, EOS, FIRST_AUDIO_CHARACTER, MARKERS, TokenSpace

NAMES = ("text_tokenizer.model", "text_tokenizer.json")  # in a data folder, an export or an extended tokenizer
NEITHER = "neither a sentencepiece model nor a tokenizer.json"
FAILED = "the tokenizer failed on a text"
PROBES = (
    "Hello, 12 worlds",
    " \t\n",
    "Grüße, Добрый день",
    "你好 مرحبا 🙂",
    "\0\x7f�",
    "a" * 50,
)  # any text must have ids
PREFIX = "▁"  # how sentencepiece writes a space
COVERAGE = 0.9995  # share of the text: rarer characters are written as bytes
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6  # kinds of sentencepiece pieces


class TextTokenizer:
    """Converts text to ids and back. Must contain BOS and EOS, as <|begin_of_text|> and <|end_of_text|>.

    `path` is a sentencepiece .model, a tokenizer.json, or a folder with a text_tokenizer of either kind, such as one
    written by `soda tokenizer extend`. Markers inside a text are treated as plain text, so no transcript can forge
    structure. Other added tokens of a tokenizer.json, such as Llama-3's <|eot_id|>, are recognised as these tokens, as
    in an export. Raises SodaError for a file in neither format, or without BOS or EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _file(Path(path))
        self.fingerprint = sha256(self.path)[:16]
        spec = self.spec()
        with reading(self.path, NEITHER):
            for token in spec["added_tokens"]:
                token["special"] = token["content"] in (BOS, EOS)
        self._model = engine(spec, self.path)
        self._model.encode_special_tokens = True
        ids = [self._model.token_to_id(token) for token in (BOS, EOS)]
        if None in ids:
            raise SodaError(f"{path}: the tokenizer has no {BOS} or no {EOS}; `soda tokenizer extend` adds them")
        if any(self._model.token_to_id(marker) is not None for marker in MARKERS):
            raise SodaError(f"{path}: it already has SODA's markers; use the {NAMES[1]} it was made from")
        self.bos, self.eos = (int(i) for i in ids)
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        declared = {token["content"]: token["id"] for token in spec["added_tokens"]}
        if wrong := [t for t, number in declared.items() if vocabulary.get(t) != number]:
            raise SodaError(f"{path}: its added token {wrong[0]!r} cannot have the id {declared[wrong[0]]:,}")
        if self.size != len(vocabulary):
            raise SodaError(f"{path}: two of its {len(vocabulary):,} tokens have the same id")
        with reading(self.path, "a tokenizer that cannot encode any text"):
            self.encode_batch(PROBES)
            self.decode(self.encode(PROBES[0]))

    def spec(self) -> dict[str, Any]:
        """The basis of an export's tokenizer.json."""
        return read_spec(self.path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS. Half a surrogate pair cannot be encoded; `clean_text` removes it."""
        with no_panic(self.path, FAILED):
            return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, faster."""
        with no_panic(self.path, FAILED):
            return [found.ids for found in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        with no_panic(self.path, FAILED):
            return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def is_byte(self, token: int) -> bool:
        """Whether it is a byte that sentencepiece falls back to: bytes after it can change what it stands for."""
        return bool(_BYTE.fullmatch(self._model.id_to_token(token) or ""))

    def space(self, codebooks: int, entries: int) -> TokenSpace:
        return TokenSpace(self.size, self.bos, self.eos, codebooks, entries)


def _file(path: Path) -> Path:
    if path.is_dir():
        return next((path / name for name in (*NAMES, "tokenizer.json") if (path / name).is_file()), path / NAMES[0])
    if not path.is_file():
        raise SodaError(f"{path}: no such tokenizer (a sentencepiece .model or a tokenizer.json)")
    return path


def data_tokenizer(folder: Path) -> TextTokenizer:
    """A data folder's text tokenizer."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if not found:
        raise SodaError(f"{folder}: contains no tokenizer; was this data folder made by `soda prepare`?")
    return TextTokenizer(found[0])


# ---- texts and documents as strings


def clean_text(text: str, space: TokenSpace) -> str:
    """`text` without anything that would look like structure in a document string; most texts do not change.

    Characters that stand for audio codes of `space` (with SODA's 8 x 2,048 these are U+E000 to U+11FFF: private use,
    ligatures, full-width and Arabic presentation forms, variation selectors, ..) are replaced by their NFKC form, or
    removed if that does not help. Markers are broken up: "<|audio_end|>" becomes "< |audio_end|>". Halves of surrogate
    pairs, which are not valid Unicode, are removed. Cleaning is idempotent.
    """
    if text.isascii() and "<|" not in text:
        return text
    last = chr(FIRST_AUDIO_CHARACTER + space.codebooks * space.entries - 1)
    forms = f"[{chr(FIRST_AUDIO_CHARACTER)}-{last}]"
    text = re.sub("[\ud800-\udfff]", "", text)
    text = re.sub(f"{forms}+", lambda run: re.sub(forms, "", unicodedata.normalize("NFKC", run[0])), text)
    return _MARKER.sub(lambda marker: f"< {marker[0][1:]}", text)


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MARKER = re.compile("|".join(map(re.escape, (BOS, EOS, *MARKERS))))


def document_string(ids: np.ndarray, space: TokenSpace, text: TextTokenizer) -> str:
    """A document of ids (tokens,) in SODA's string form: markers, text, and a character per code."""
    ids = np.asarray(ids, np.int64)
    special = {space.bos: BOS, space.eos: EOS} | {space.text_size + i: m for i, m in enumerate(MARKERS)}
    audio = ids >= space.audio_base
    alone = np.isin(ids, list(special))
    begins = np.flatnonzero(np.diff(audio, prepend=~audio[:1]) | alone | np.concatenate([[False], alone[:-1]]))
    parts = []
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        if alone[begin]:
            parts.append(special[int(ids[begin])])
        elif audio[begin]:
            codes = ids[begin:end] - space.audio_base + FIRST_AUDIO_CHARACTER
            parts.append(codes.astype("<u4").tobytes().decode("utf-32-le"))
        else:
            parts.append(text.decode(ids[begin:end]))
    return "".join(parts)


# ---- both formats as the content of a tokenizer.json


def read_spec(path: Path) -> dict[str, Any]:
    """The content of the tokenizer.json `path`, or its equivalent for a sentencepiece model, without steps that depend
    on being at the start of an input: a text must have the same ids alone and inside a document. Raises SodaError for a
    file in neither format.
    """
    with reading(path, NEITHER):
        spec = json.loads(path.read_bytes()) if path.suffix == ".json" else _sentencepiece_spec(path)
        spec["model"]["vocab"]
        if drawn := [name for name in ("dropout", "alpha", "nbest_size") if spec["model"].get(name)]:
            raise SodaError(f"{path}: model.{drawn[0]} makes its ids random; set it to null")
        spec.update(post_processor=None, truncation=None, padding=None)
        spec["added_tokens"] = spec.get("added_tokens") or []
        _fill(spec, path)
        if _never_prefix_the_first(spec.get("pre_tokenizer")):
            _never_prefix_the_first(spec.get("decoder"))
            decoder = spec.get("decoder") or {}
            if "decoders" in decoder:
                decoder["decoders"] = [d for d in decoder["decoders"] if d.get("type") != "Strip"]
    return spec


def _fill(spec: dict[str, Any], path: Path) -> None:
    """Gives every id up to the largest a token. The library numbers tokens consecutively even if a tokenizer.json has
    gaps, so that added tokens and SODA's would get the wrong ids. The tokens that fill gaps occur in no text, because
    an end never precedes its beginning."""
    vocabulary, added = spec["model"]["vocab"], {int(token["id"]): token for token in spec["added_tokens"]}
    of_model = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    last, behind = max([*of_model, *added], default=-1), max(of_model, default=-1)
    if last >= LARGEST:
        raise SodaError(f"{path}: the id {last:,} is too large for a model's vocabulary (at most {LARGEST:,})")
    for number in sorted(set(range(last + 1)) - of_model):
        token = added.get(number) or {"content": f"{BOS}{EOS}{number}"}
        if number < behind:
            vocabulary.setdefault(token["content"], number)
        elif number not in added:
            spec["added_tokens"].append({"id": number, **token, **_PLAIN})
    spec["added_tokens"].sort(key=lambda token: token["id"])


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
LARGEST = 1 << 22  # ids


def engine(spec: dict[str, Any], path: Path) -> Any:
    """The `tokenizers.Tokenizer` for a spec; `path` is used in errors."""
    from tokenizers import Tokenizer

    with reading(path, NEITHER):
        return Tokenizer.from_str(json.dumps(spec))


def _never_prefix_the_first(part: Any) -> bool:
    """Removes the step that adds a space before the first word of an input only, because texts inside a document are
    not first. Returns whether it was there."""
    found = False
    if isinstance(part, dict):
        found = part.get("prepend_scheme") == "first"
        part.update({"prepend_scheme": "never"} if found else {})
    for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        found |= _never_prefix_the_first(one)
    return found


def _sentencepiece_spec(path: Path) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(path.read_bytes())
    trainer, how = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (1, 2) or trainer.treat_whitespace_as_suffix or not how.escape_whitespaces:
        raise SodaError(f"{path}: only sentencepiece's unigram and bpe models with spaces before words are supported")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    defined = sorted((p.piece for p in proto.pieces if p.type == USER_DEFINED), key=len, reverse=True)
    unknown, byte_fallback = trainer.unk_id, any(piece.type == BYTE for piece in proto.pieces)
    if trainer.model_type == 1:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=byte_fallback)
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        whole = [p.piece for p in proto.pieces if p.type == NORMAL and len(p.piece) > 1]
        whole.sort(key=lambda piece: -pieces[ids[piece]][1])
        cuts = ((piece[:i], piece[i:]) for piece in whole for i in range(1, len(piece)))
        merges = [(left, right) for left, right in cuts if left in ids and right in ids]
        model = models.BPE(ids, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=byte_fallback)
        model.ignore_merges = bool(defined)  # no text makes such a piece
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if how.precompiled_charsmap:
        steps.append(normalizers.Precompiled(how.precompiled_charsmap))
    if how.remove_extra_whitespaces:
        steps += [normalizers.Replace(PREFIX, " "), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if how.add_dummy_prefix:
        steps.append(normalizers.Prepend(PREFIX))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", PREFIX)])
    # Texts are split around user-defined pieces, which stay whole, and inside anything that spells a non-text piece
    # such as <unk> or <0x41>, so that it is not recognised.
    spelled = {p.piece for p in proto.pieces if p.type not in (NORMAL, USER_DEFINED, BYTE, UNUSED)} | {BOS, EOS}
    if trainer.model_type != 1 and not defined:
        spelled = {piece for piece in spelled if piece.startswith("<")}
    inside = [f"{re.escape(piece[:1])}(?={re.escape(piece[1:])})" for piece in sorted(spelled) if len(piece) > 1]
    cuts = "|".join([*map(re.escape, defined), *inside, "<(?=0x[0-9A-F]{2}>)"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(PREFIX, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if how.add_dummy_prefix else []),
        ]
    )
    return json.loads(tokenizer.to_str())


def write_byte_tokenizer(path: Path) -> None:
    """Writes a tokenizer.json whose ids are the UTF-8 bytes, BOS and EOS. It encodes any text and needs no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # stands for a byte that is not a letter
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    write_text(path, tokenizer.to_str())


def train_sentencepiece(path: Path, sentences: Iterable[str], pieces: int) -> None:
    """Trains a unigram sentencepiece model with byte fallback on `sentences` and writes it to `path`.

    Raises SodaError if there is no text, or if it has more distinct characters than pieces.
    """
    import sentencepiece

    some = [part for sentence in sentences for part in _parts(sentence)]
    check_pieces(some, pieces)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(some),
                model_writer=file,
                vocab_size=pieces,
                model_type="unigram",
                character_coverage=COVERAGE,
                byte_fallback=True,  # any text can be encoded
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                hard_vocab_limit=False,  # with little text there are fewer pieces
                bos_piece=BOS,
                eos_piece=EOS,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise SodaError(
                f"cannot train a tokenizer of {pieces} pieces on these transcripts: {error}. Give more text "
                "(prepare.text)."
            ) from None


def check_pieces(sentences: Iterable[str], pieces: int) -> None:
    """Raises the SodaError that train_sentencepiece would raise if the sentences have more characters than pieces."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        sentence = sentence.rstrip("\r\n")
        if sentence and "▅" not in sentence:  # sentencepiece's own marker character: it drops such a sentence
            counts.update(sentence)
            counts[PREFIX] += 1  # before the first word
    counts[PREFIX] += counts.pop(" ", 0)
    counts.pop("\0", None)
    if not counts[PREFIX]:
        return
    # sentencepiece's rule, in its single precision: the most frequent characters, until they cover COVERAGE of the
    # text.
    so_far = np.cumsum(sorted(counts.values(), reverse=True))
    covered = np.float32(so_far / so_far[-1]) >= np.float32(COVERAGE)
    needed = 3 + 256 + int(np.argmax(covered)) + 1
    if needed > pieces:
        raise SodaError(
            f"cannot train a tokenizer of {pieces} pieces on these transcripts: their letters and the 256 bytes need "
            f"{needed}. Set prepare.text_pieces={needed} or higher."
        )


def _parts(sentence: str) -> list[str]:
    """The sentence, or parts of it if it is longer than sentencepiece accepts (4,192 bytes), cut after a space if there
    is one."""
    if len(sentence.encode()) <= 4192:
        return [sentence]
    return re.findall(r".{1,1000}(?:(?<= )|\Z)|.{1000}", sentence, re.S)
