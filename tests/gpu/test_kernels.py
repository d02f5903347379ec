"""csrc's CUDA kernels against the reference on the CPU."""

import numpy as np
import pytest
import torch

from megatron_soda import ops
from megatron_soda.ops import library, reference
from tests.ops.test_ops import damaged, stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def built():
    if not library.has_cuda():
        pytest.skip(library.describe())


def equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.is_cuda
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("bits", range(1, 25))
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 8, 9, 16, 17, 32])
def test_packing(slots, bits):
    generator = torch.Generator().manual_seed(bits)
    for frames in (0, 1, 2, 3, 5, 33, 1000, 10_007):
        codes = torch.randint(2**bits, (frames, slots), generator=generator, dtype=torch.int32)
        packed = reference.pack_frames(codes, bits)
        equal(ops.pack_frames(codes.cuda(), bits), packed)
        short = (codes % 2**15).short()
        equal(ops.pack_frames(short.cuda(), bits), reference.pack_frames(short, bits))
        equal(ops.unpack_frames(packed.cuda(), slots, bits), codes)
        if frames > 3:  # a plane that begins at an odd byte
            equal(ops.unpack_frames(packed.cuda()[3:], slots, bits), codes[3:])


@pytest.mark.parametrize("value", [-1, 2048, 32767, -32768])
def test_the_first_code_out_of_range_is_named(value):
    codes = torch.zeros(5000, 9, dtype=torch.int16)
    codes[4000, 3] = codes[4999, 0] = value
    with pytest.raises(ValueError, match=rf"^codes\[4000, 3\] is {value}, not in \[0, 2048\)$"):
        ops.pack_frames(codes.cuda(), 11)


@pytest.mark.parametrize("slots", [1, 3, 8, 9, 16, 32])
@pytest.mark.parametrize("bits", [1, 5, 8, 11, 15, 16, 24])
@pytest.mark.parametrize("text_bits", [1, 10, 17, 24])
def test_windows(slots, bits, text_bits):
    for seed in range(4):
        ids, tables, how = stream(seed, slots, bits, text_bits)
        if not len(ids):
            continue
        on_gpu = [table.cuda() for table in tables]
        rng = np.random.default_rng(seed)
        for length in {1, 2, 3, 4, 5, len(ids) // 2 + 1, len(ids)}:
            if length <= len(ids):
                begins = torch.from_numpy(rng.integers(0, len(ids) - length + 1, 7))
                wanted = torch.from_numpy(np.stack([ids[begin : begin + length] for begin in begins.tolist()]))
                equal(ops.Stream(*on_gpu, **how).windows(begins.cuda(), length), wanted)
        with pytest.raises(ValueError, match=rf"^window 1: 1 tokens from token {len(ids)} on are not"):
            ops.Stream(*on_gpu, **how).windows(torch.tensor([0, len(ids)]).cuda(), 1)


@pytest.mark.parametrize("length", [2047, 2048, 2049, 6001])
def test_windows_of_a_long_stream(length):
    """Many runs, so that the search takes several steps; rows that begin at every alignment."""
    generator = torch.Generator().manual_seed(length)
    runs, slots, bits = 5000, 8, 11
    counts = torch.randint(0, 40, (runs,), generator=generator)
    words = torch.randint(0, 60, (runs,), generator=generator)
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    starts = torch.cat([(words + slots * counts).cumsum(0) - slots * counts, (words + slots * counts).sum()[None]])
    text = torch.randint(256, (-(-int(words.sum()) // 8), 17), generator=generator, dtype=torch.uint8)
    frames = torch.randint(256, (int(counts.sum()), bits), generator=generator, dtype=torch.uint8)
    begins = torch.randint(int(starts[-1]) - length + 1, (50,), generator=generator)
    tables = text, frames, starts, firsts, begins
    wanted = reference.expand_windows(*tables, length, slots, bits, 17, 130_000, 2048)
    how = {"slots": slots, "bits": bits, "text_bits": 17, "audio_base": 130_000, "entries": 2048}
    on_gpu = [table.cuda() for table in tables]
    equal(ops.Stream(*on_gpu[:4], **how).windows(on_gpu[4], length), wanted)


@pytest.mark.parametrize(
    ("which", "index", "value"),
    [(2, 0, -1), (2, 1, 4), (2, 1, 2), (3, 1, 4), (3, 1, -1), (3, 0, 3), (3, 0, 2**62), (3, 2, 2**62), (2, 1, 2**62)],
)
def test_damage_is_found(which, index, value):
    how = {"slots": 2, "bits": 4, "text_bits": 8, "audio_base": 10, "entries": 16}
    begins = torch.tensor([0, 0]).cuda()
    tables = [table.cuda() for table in damaged(which, index, value)]
    with pytest.raises(ValueError, match="window 0: its runs lead outside"):
        ops.Stream(*tables, **how).windows(begins, 14)
    tables = [table.cuda() for table in damaged(2, 0, 3)]  # the device is still well
    assert (
        ops.Stream(*tables, **how).windows(begins, 14).tolist()
        == [[0, 1, 2, 10, 26, 10, 26, 3, 4, 10, 26, 5, 6, 7]] * 2
    )


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 2047, 2048, 2049, 8191])
@pytest.mark.parametrize("sequences", [1, 2, 7, 300])
@pytest.mark.parametrize("reset", [False, True])
def test_batches(length, sequences, reset):
    generator = torch.Generator().manual_seed(length)
    vocabulary = 50
    ids = torch.randint(vocabulary, (sequences, length + 1), generator=generator, dtype=torch.int32)
    ids[0] = 2  # a row of EOS alone
    ids[-1] = ids[-1].clamp(min=3)  # and one without
    counts = torch.randint(-1, length + 2, (sequences,), generator=generator)
    classes = torch.randint(5, (vocabulary,), generator=generator, dtype=torch.uint8)
    tables = ids, counts, classes, torch.rand(5, generator=generator)
    labels = torch.rand(sequences, length, generator=generator)
    for own in (None, labels):
        wanted = reference.build_batch(*tables, 2, reset, own)
        on_device = *(table.cuda() for table in tables), 2, reset, None if own is None else own.cuda()
        for a, b in zip(ops.build_batch(*on_device), wanted, strict=True):
            equal(a, b)


@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [0, 1, 2999, 3000])
def test_an_id_outside_the_vocabulary(bad, place):
    ids = torch.full((3, 3001), 7, dtype=torch.int32)
    ids[1, place] = bad
    tables = ids, torch.full((3,), 3000), torch.zeros(20, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match=rf"^ids must lie in \[0, 20\), found {min(bad, 7)} to {max(bad, 7)}$"):
        ops.build_batch(*(table.cuda() for table in tables), 2, False)


def test_another_stream():
    """The kernels run on torch's current stream, behind what was put there before."""
    codes = torch.randint(2048, (200_000, 8), dtype=torch.int32)
    packed = reference.pack_frames(codes, 11)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = ops.unpack_frames(packed.pin_memory().cuda(non_blocking=True), 8, 11)
    side.synchronize()
    equal(found, codes)
