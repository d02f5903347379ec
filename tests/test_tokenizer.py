import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import interleave
from megatron_soda.errors import SodaError
from megatron_soda.hf.tokenizer import build_tokenizer, document_string, save_tokenizer
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import BOS, EOS, MARKERS

SENTENCES = [
    "Please enter your password, followed by the pound key.",
    "¿Desea dejar un mensaje? Oprima uno.",
    "Vous avez trois nouveaux messages.",
    "The person at extension four hundred is on the phone.",
] * 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "text_tokenizer.model"
    train_sentencepiece(path, SENTENCES, 340)
    return TextTokenizer(path)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_survives(text, string):
    """Byte fallback: nothing is lost, but for sentencepiece's own reading of white space."""
    string = " ".join(string.replace("▁", " ").replace("\0", "").split())
    assert text.decode(text.encode(string)) == string


def test_markers_in_a_transcript_are_text(text):
    for marker in (BOS, EOS, *MARKERS):
        ids = text.encode(f"a {marker} b")
        assert text.bos not in ids
        assert text.eos not in ids
        assert max(ids) < text.size


@given(st.lists(st.sampled_from([*SENTENCES, "naïve façade", "x", "日本"]), min_size=1, max_size=3), st.integers(0, 99))
@settings(max_examples=100)
def test_exported_tokenizer_gives_our_ids(text, texts, seed):
    space = text.space(4, 16)
    hf = build_tokenizer(text, space)
    rng = np.random.default_rng(seed)
    utterances = [(text.encode(t), rng.integers(0, 16, (3, 4))) for t in texts]
    for document in (interleave.text_first(utterances, space), interleave.audio_first(utterances, space)):
        string = document_string(document, space, text)
        assert hf.encode(string, add_special_tokens=False).ids == document.tolist()
        assert hf.encode(string[len(BOS) :]).ids == document.tolist()  # BOS is put before


def test_saved_tokenizer_loads_in_transformers(text, tmp_path):
    from transformers import AutoTokenizer

    space = text.space(4, 16)
    save_tokenizer(text, space, tmp_path, 512)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == space.size
    assert loaded.bos_token_id == space.bos
    assert loaded.eos_token_id == space.eos
    assert loaded.convert_tokens_to_ids(["<|audio_end|>", chr(0xE000 + 17)]) == [space.audio_end, space.audio_base + 17]


def test_tokenizer_json(tmp_path):
    """A Hugging Face tokenizer.json serves as text tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TextTokenizer(tmp_path / "tokenizer.json")
    assert (text.size, text.bos, text.eos) == (tokenizer.get_vocab_size(), 0, 1)
    assert text.decode(text.encode("Vous avez <|end_of_text|> trois")) == "Vous avez <|end_of_text|> trois"
    assert text.eos not in text.encode("a <|end_of_text|> b")
    space = text.space(4, 16)
    hf = build_tokenizer(text, space)
    document = interleave.text_first([(text.encode("Vous avez"), np.zeros((1, 4), int))], space)
    assert hf.encode(document_string(document, space, text), add_special_tokens=False).ids == document.tolist()


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(SodaError, match="no such tokenizer"):
        TextTokenizer(tmp_path / "none.model")
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(SodaError, match="neither a sentencepiece model"):
            TextTokenizer(tmp_path / name)
    with pytest.raises(SodaError, match="text_pieces"):
        train_sentencepiece(tmp_path / "x.model", SENTENCES, 100)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "plain.json"))
    with pytest.raises(SodaError, match="has no <|begin_of_text|>".replace("|", r"\|")):
        TextTokenizer(tmp_path / "plain.json")
