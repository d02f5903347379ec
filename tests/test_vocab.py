import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import interleave
from megatron_soda.vocab import EOS_KIND, LLAMA3, Grammar, TokenSpace
from tests.helpers import SPACE, documents


def test_llama3_ids_are_sodas():
    """soda-research's released tokenizer: 144,644 ids."""
    assert LLAMA3.size == 144_644
    assert (LLAMA3.text_start, LLAMA3.text_end, LLAMA3.audio_start, LLAMA3.audio_end) == (
        128256,
        128257,
        128258,
        128259,
    )
    ids = LLAMA3.audio_ids(np.array([[0, 0, 0, 0, 0, 0, 0, 0], [2047] * 8]))
    assert ids[0] == 128260
    assert ids[1] == 130308
    assert ids[15] == 144643
    assert ids[8] == 128260 + 2047


@given(st.lists(st.lists(st.integers(0, 15), min_size=4, max_size=4), max_size=20))
def test_codes_round_trip(rows):
    codes = np.array(rows, np.int16).reshape(-1, 4)
    assert np.array_equal(SPACE.codes(SPACE.audio_ids(codes)), codes)


@pytest.mark.parametrize("codes", [np.zeros((2, 3)), np.full((1, 4), 16), np.full((1, 4), -1), np.zeros(4)])
def test_bad_codes_are_refused(codes):
    with pytest.raises(ValueError, match="codes must"):
        SPACE.audio_ids(codes)


def test_classes():
    table = SPACE.class_table()
    assert len(table) == SPACE.size == 64 + 4 + 4 * 16
    assert [table[i] for i in (0, SPACE.bos, SPACE.eos, 64, 67, 68, 83, 84, SPACE.size - 1)] == [
        0,
        1,
        1,
        1,
        1,
        2,
        2,
        3,
        5,
    ]
    assert SPACE.class_names == ["text", "marker", "semantic", "acoustic_1", "acoustic_2", "acoustic_3"]


def test_documents_are_written_as_the_paper_writes_them():
    s = TokenSpace(text_size=10, bos=1, eos=2, codebooks=2, entries=4)
    codes = np.array([[0, 1], [3, 2]])
    audio = [12, 14, 19, 17, 20, 13]
    text = [10, 5, 6, 11]
    assert interleave.text_first([([5, 6], codes)], s).tolist() == [1, *text, *audio, 2]
    assert interleave.audio_first([([5, 6], codes)], s).tolist() == [1, *audio, *text, 2]
    assert interleave.text_first([([5, 6], codes), ([5, 6], codes)], s).tolist() == [1, *text, *audio, *text, *audio, 2]
    assert interleave.text_only([5, 6], s).tolist() == [1, 5, 6, 2]


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([1, 12, 14, 18, 13, 2], None),
        ([1, 12, 14, 13, 2], "token 3: <|audio_end|> is not legal at slot 1 of an audio frame"),
        ([1, 12, 18, 14, 13, 2], "token 2: a code of codebook 1 is not legal right after <|audio_start|>"),
        ([1, 12, 13, 2], "token 2: <|audio_end|> is not legal right after <|audio_start|>"),
        ([1, 10, 11, 2], "token 2: <|text_end|> is not legal right after <|text_start|>"),
        ([1, 10, 5, 2], "token 3: <|end_of_text|> is not legal inside a text span"),
        ([1, 5, 11, 2], "token 2: <|text_end|> is not legal inside bare text"),
        ([12, 14, 18, 13, 2], "token 0: <|audio_start|> is not legal at the start of a document"),
        ([1, 2], "token 1: <|end_of_text|> is not legal right after <|begin_of_text|>"),
        ([1, 5], "token 2: the document ends inside bare text"),
        ([1, 5, 2, 1], "token 3: <|begin_of_text|> is not legal after <|end_of_text|>"),
        ([1, 99, 2], "token 1: id 99 is out of range [0, 22)"),
    ],
)
def test_check_says_what_is_wrong_and_where(ids, problem):
    s = TokenSpace(text_size=10, bos=1, eos=2, codebooks=2, entries=4)
    assert s.check(np.array(ids)) == problem


@given(st.integers(0, 500), st.integers(0, 10**6), st.integers(0, SPACE.size - 1))
def test_grammar_notices_every_change_of_kind(seed, where, token):
    """Replacing a token keeps a document legal only if the new token is of the same kind."""
    document = documents(1, seed)[0]
    assert SPACE.check(document) is None
    changed = document.copy()
    changed[where % len(document)] = token
    kinds = SPACE.kind_table()
    if (SPACE.check(changed) is None) != (kinds[changed] == kinds[document]).all():
        # the one exception: a one-token bare text or a one-frame document cannot become another legal one by one token
        raise AssertionError((document, changed))


@pytest.mark.parametrize("codebooks", [1, 2, 8])
def test_shortest_end_is_reachable(codebooks):
    """Following the distances down always closes the document in exactly that many tokens."""
    space = TokenSpace(text_size=10, bos=1, eos=2, codebooks=codebooks, entries=4)
    grammar = Grammar(space)
    distance = grammar.shortest_end()
    for state in range(grammar.states):
        if state == Grammar.END:
            continue
        steps, at, last = 0, state, None
        while at != Grammar.END:
            last, at = min(
                ((k, f) for (s, k), f in grammar.step.items() if s == at), key=lambda move: distance[move[1]]
            )
            steps += 1
        assert steps == distance[state]
        assert last == EOS_KIND
