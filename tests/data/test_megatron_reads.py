"""Stock megatron-core reads our stores: its GPTDataset gives our stream, without a line of ours in between."""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_soda.data.store import Store
from megatron_soda.hf.tokenizer import save_tokenizer
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import LLAMA3
from tests.helpers import SPACE, write_data
from tests.test_tokenizer import SENTENCES

LENGTH = 32
OLD = metadata.version("megatron-core").startswith("0.16.")  # its NullTokenizer has one id more than it is told
MORE = 0 if OLD else 1


def null_tokenizer(vocab_size: int) -> Any:
    """As pretrain_gpt.py makes it for --tokenizer-type NullTokenizer --vocab-size N."""
    from megatron.core import tokenizers

    tokenizer: Any = tokenizers.MegatronTokenizer
    library = "null" if OLD else "null-text"
    return tokenizer.from_pretrained(metadata_path={"library": library}, vocab_size=vocab_size)


def datasets(
    paths: list[str], weights: list[float] | None, tokenizer: Any, cache: Path | None, sizes: list, reset: bool = False
) -> Any:
    """As pretrain_gpt.py makes them for --train-data-path, --valid-data-path and --test-data-path."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    others = [str(Path(paths[0]).parent / side) for side in ("valid", "test")]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend_per_split=[(paths, weights), *[([path], None) for path in others]],
        path_to_cache=cache and str(cache),  # else beside the stores
        tokenizer=tokenizer,
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=reset,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_its_samples_are_our_stream(data, tmp_path):
    train, valid, test = datasets([str(data / "train")], None, null_tokenizer(SPACE.size + MORE), tmp_path, [None] * 3)
    for dataset, side in ((train, "train"), (valid, "valid"), (test, "test")):
        store = Store(data / side)
        documents = [store.document(i) for i in dataset.document_index]  # it shuffles documents, then cuts
        stream = np.concatenate(documents)
        assert len(stream) == store.size
        assert len(dataset) == (store.size - 1) // LENGTH
        for i in range(len(dataset)):
            window = int(dataset.shuffle_index[i])
            expected = stream[window * LENGTH : window * LENGTH + LENGTH + 1]
            assert np.array_equal(dataset[i]["tokens"], expected[:-1])
            assert np.array_equal(dataset[i]["labels"], expected[1:])
            assert dataset[i]["loss_mask"].all()  # no id of ours is taken for padding


def test_it_blends_our_stores(tmp_path):
    paths = [str(write_data(tmp_path / name) / "train") for name in ("a", "b")]
    blended, *_ = datasets(paths, [0.75, 0.25], null_tokenizer(SPACE.size + MORE), None, [40, 4, 4])
    assert len(blended) == 40
    assert np.bincount(blended.dataset_index).tolist() == [30, 10]


def test_null_tokenizer_ends_documents_with_its_last_id():
    """Of megatron-core 0.16.1 --vocab-size 144643 takes the last code of the last codebook for it, and 144644 takes no
    id of ours; of 0.19.2 144644 and 144645."""
    assert LLAMA3.size == 144_644
    short, whole = null_tokenizer(LLAMA3.size - 1 + MORE), null_tokenizer(LLAMA3.size + MORE)
    assert (short.vocab_size, short.eod) == (144_644, 144_643)
    assert short.eod == LLAMA3.audio_ids(np.full((1, 8), 2047))[-1]
    assert (whole.vocab_size, whole.eod) == (144_645, 144_644)
    assert -(-short.vocab_size // 128) == -(-whole.vocab_size // 128)  # padded to 144,768 both ways


def test_with_our_exported_tokenizer_it_knows_our_documents(tmp_path):
    """--tokenizer-type HuggingFaceTokenizer --tokenizer-model RUN/hf: then the reset flags work on our EOS."""
    from megatron.core import tokenizers

    train_sentencepiece(tmp_path / "text_tokenizer.model", SENTENCES, 310)
    text = TextTokenizer(tmp_path / "text_tokenizer.model")
    space = text.space(4, 16)
    data = write_data(tmp_path / "data", space=space)
    save_tokenizer(text, space, tmp_path / "hf", 4096)
    kind: Any = tokenizers.MegatronTokenizer
    tokenizer = kind.from_pretrained(tokenizer_path=str(tmp_path / "hf"), metadata_path={"library": "huggingface"})
    assert (tokenizer.vocab_size, tokenizer.eod) == (space.size, space.eos)
    train, *_ = datasets([str(data / "train")], None, tokenizer, tmp_path / "cache", [None] * 3, reset=True)
    starts = 0
    for sample in (train[i] for i in range(len(train))):
        tokens = sample["tokens"].numpy()
        ends = np.flatnonzero(tokens[:-1] == space.eos)
        assert not sample["position_ids"].numpy()[ends + 1].any()  # a document begins at position 0
        assert not sample["loss_mask"].numpy()[tokens == space.eos].any()
        starts += len(ends)
    assert starts > 20
