"""`soda validate`: whether every document of the stores is legal."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ..errors import SodaError
from ..vocab import AUDIO_END, AUDIO_START, BOS_KIND, EOS_KIND, FIRST_CODE, TEXT, TEXT_END, TEXT_START, TokenSpace
from .store import Store

console = Console(stderr=True)
_DOCUMENTS_AT_ONCE = 4096


def validate(folder: Path) -> bool:
    """Checks the stores train, valid and test of a data folder and prints what is wrong. True if nothing is.

    The stores must share one token space, and no document may stand in two of them.
    """
    good = True
    seen: dict[bytes, str] = {}
    spaces: dict[TokenSpace, str] = {}
    for side in ("train", "valid", "test"):
        try:
            store = Store(folder / side)
            store.check_index()
        except SodaError as error:
            print(f"{side}: {error}")
            good = False
            continue
        spaces.setdefault(store.space, side)
        problems = list(find_problems(store))
        for problem in problems[:10]:
            print(f"{store.path}: {problem}")
        if len(problems) > 10:
            print(f"{store.path}: and {len(problems) - 10} documents more")
        leaked = 0
        for index in range(len(store)):
            owner = seen.setdefault(store.document(index).tobytes(), side)
            leaked += owner != side
        if leaked:
            print(f"{store.path}: {leaked} documents stand in another store too")
        good &= not problems and not leaked
        print(f"{side}: {store.size:,} tokens, {len(store):,} documents, {len(problems)} bad")
    if len(spaces) > 1:
        print(f"the stores are of different vocabularies: {spaces}")
        good = False
    return good


def find_problems(store: Store):
    """Yields "document i, token j: what is wrong" for every document that is not legal."""
    for first in track(range(0, len(store), _DOCUMENTS_AT_ONCE), f"validate {store.path.name}", console=console):
        last = min(first + _DOCUMENTS_AT_ONCE, len(store))
        offsets = store.offsets(first, last)
        start = int(offsets[0])
        ids = store.read(start, int(offsets[-1]) - start)
        offsets -= start
        if ids.min() >= 0 and ids.max() < store.space.size and _all_legal(ids, offsets, store.space, store.slots):
            continue
        for i in range(first, last):  # the slow way, which can tell where
            problem = store.space.check(store.document(i), store.slots)
            if problem:
                yield f"document {i}, {problem}"


def _all_legal(ids: np.ndarray, offsets: np.ndarray, space: TokenSpace, slots: int) -> bool:
    """Whether every document ids[offsets[i]:offsets[i + 1]] is legal: the grammar of vocab.py without a loop."""
    kinds = space.kind_table()[ids].astype(np.int64)
    if (kinds[offsets[:-1]] != BOS_KIND).any() or (kinds[offsets[1:] - 1] != EOS_KIND).any():
        return False
    number = FIRST_CODE + space.codebooks
    pairs = np.zeros((number, number), bool)
    last_code = FIRST_CODE + slots - 1
    for before, after in (
        (BOS_KIND, (TEXT, TEXT_START, AUDIO_START)),
        (TEXT_START, (TEXT,)),
        (TEXT, (TEXT, TEXT_END, EOS_KIND)),
        (TEXT_END, (TEXT_START, AUDIO_START, EOS_KIND)),
        (AUDIO_START, (FIRST_CODE,)),
        (last_code, (FIRST_CODE, AUDIO_END)),
        (AUDIO_END, (TEXT_START, AUDIO_START, EOS_KIND)),
        (EOS_KIND, (BOS_KIND,)),
    ):
        pairs[before, list(after)] = True
    for slot in range(slots - 1):
        pairs[FIRST_CODE + slot, FIRST_CODE + slot + 1] = True
    if not pairs[kinds[:-1], kinds[1:]].all() or np.count_nonzero(kinds == EOS_KIND) != len(offsets) - 1:
        return False
    # Text is bare (between BOS and EOS) or a span (between its markers), never a mix of both.
    is_text = kinds == TEXT
    opened = kinds[:-1][~is_text[:-1] & is_text[1:]]
    closed = kinds[1:][is_text[:-1] & ~is_text[1:]]
    return bool(((opened == BOS_KIND) == (closed == EOS_KIND)).all())
