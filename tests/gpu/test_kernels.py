"""csrc's CUDA kernels against the reference on the CPU."""

import pytest
import torch

from megatron_soda import ops
from megatron_soda.ops import library, reference

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
