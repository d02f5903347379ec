"""Made-up documents in SODA's own vocabulary: a store for each corpus of a recipe, so that it runs without its data.

python examples/pretrain/synthetic.py RECIPE FOLDER    prints the settings that point the recipe to these stores
"""

import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep import interleave
from megatron_soda.config import load_recipe
from megatron_soda.data.store import write_store
from megatron_soda.vocab import LLAMA3

TOKENS = 100_000  # of a store


def documents(seed: int, text_alone: bool) -> Iterator[np.ndarray]:
    """Random text and codes in legal documents: in both orders, or text only."""
    rng = np.random.default_rng(seed)
    tokens = 0
    while tokens < TOKENS:
        text = rng.integers(0, LLAMA3.bos, rng.integers(5, 30)).tolist()
        codes = rng.integers(0, LLAMA3.entries, (rng.integers(10, 60), LLAMA3.codebooks))
        order = interleave.text_first if rng.random() < 0.5 else interleave.audio_first
        made = interleave.text_only(text, LLAMA3) if text_alone else order([(text, codes)], LLAMA3)
        tokens += len(made)
        yield made


def main() -> None:
    recipe, folder = load_recipe(sys.argv[1]), Path(sys.argv[2])
    names = list(recipe.data.corpora)
    for name in [*names, "valid"]:
        write_store(folder / name, documents(zlib.crc32(name.encode()), name == "nemotron"), LLAMA3)
    corpora = {name: str(folder / name) for name in names}  # JSON is YAML, whatever the names are
    print(f"data.corpora={json.dumps(corpora)}")
    print(f"data.mix={json.dumps([{'from_step': 0, 'shares': recipe.data.mix[0].shares}])}")
    print(f"data.path={folder}")


if __name__ == "__main__":
    main()
