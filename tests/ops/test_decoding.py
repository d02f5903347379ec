"""The kernels of decoding: csrc with and without vector instructions, and the reference, against independent numpy."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_soda import ops
from megatron_soda.ops import library
from tests.ops.test_ops import same


def vectors(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    x = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32))
    x[:, ::7] *= 30
    x[rows // 2 :][:1] = 0
    return x


LINEAR = list(itertools.product([1, 2, 4, 5, 16], [1, 7, 8, 16, 40, 515], [1, 3, 8, 21]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_floats(side, dtype):
    """Against float64, within the error that float32 sums have: their length times half a unit."""
    rng = np.random.default_rng(0)
    for rows, columns, out in LINEAR:
        x = vectors(rng, rows, columns)
        weight = torch.from_numpy(rng.standard_normal((out, columns)).astype(np.float32)).to(dtype)
        found = side.linear(x, weight)
        a, b = x.double().numpy(), weight.double().numpy()
        assert found.dtype == torch.float32
        assert found.shape == (rows, out)
        assert (np.abs(found.numpy() - a @ b.T) <= columns * 2**-24 * (np.abs(a) @ np.abs(b).T)).all()


def test_linear_of_integers_is_exact(side):
    rng = np.random.default_rng(1)
    for rows, columns, out in LINEAR:
        x = vectors(rng, rows, columns)
        weight = rng.integers(-127, 128, (out, columns)).astype(np.int8)
        weight[0] = 127
        scale = rng.random(out).astype(np.float32)
        limit = np.float32(min(32767, (2**31 - 1) // (128 * columns)))
        largest = np.abs(x.numpy()).max(1, keepdims=True)
        by = np.divide(limit, largest, out=np.zeros_like(largest), where=largest > 0)
        sums = np.rint(x.numpy() * by).astype(np.int64) @ weight.T.astype(np.int64)
        wanted = sums.astype(np.float32) * (largest / limit * scale)
        same(side.linear(x, torch.from_numpy(weight), torch.from_numpy(scale)), wanted)
        exact = x.double().numpy() @ (weight * scale[:, None].astype(np.float64)).T
        bound = columns * largest / limit * 127 * scale  # half a unit of each number, and rounding
        assert (np.abs(wanted - exact) <= bound + 1e-6 * np.abs(exact)).all()


def test_threads_share_the_rows_of_a_matrix(side):
    rng = np.random.default_rng(2)
    x, weight = vectors(rng, 2, 512), torch.from_numpy(rng.integers(-127, 128, (1001, 512)).astype(np.int8))
    scale = torch.ones(1001)
    alone = side.linear(x, weight, scale)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(side.linear(x, weight, scale), alone)
    finally:
        torch.set_num_threads(threads)


def test_sums_of_the_largest_integers_fit(side):
    x, weight = torch.full((1, 9728), 3.0), torch.full((1, 9728), -128, dtype=torch.int8)
    assert float(side.linear(x, weight, torch.ones(1))) == pytest.approx(-3.0 * 128 * 9728, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "out"), [(0, 3), (0, 16), (2, 0), (0, 0)])
def test_products_of_nothing(side, rows, out, dtype):
    weight = torch.ones(out, 40).to(dtype)
    found = side.linear(torch.ones(rows, 40), weight, torch.ones(out) if dtype == torch.int8 else None)
    assert found.shape == (rows, out)
    assert found.dtype == torch.float32


def test_quantised_rows():
    weight = torch.from_numpy(np.random.default_rng(3).standard_normal((5, 33)).astype(np.float32))
    weight[2] = 0
    integers, scale = ops.quantise_rows(weight)
    assert integers.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((integers * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize(
    ("x", "weight", "scale", "error", "words"),
    [
        (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(2, 4), None, TypeError, "x must be float32, not float64"),
        (torch.zeros(1, 4), torch.zeros(2, 4).half(), None, TypeError, "weight must be float32 or bfloat16 or int8"),
        (torch.zeros(1, 4), torch.zeros(2, 5), None, ValueError, "the same columns"),
        (torch.zeros(1, 4), torch.zeros(2, 4), torch.ones(2), ValueError, "others must not have one"),
        (torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.int8), None, ValueError, "int8 weights need a scale"),
        (torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.int8), torch.ones(3), ValueError, r"scale must be \(2,\)"),
        (torch.zeros(1, 4), torch.zeros(4, 2).T, None, ValueError, "weight must be contiguous"),
    ],
)
def test_what_linear_refuses(side, x, weight, scale, error, words):
    with pytest.raises(error, match=words):
        side.linear(x, weight, scale)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 512), (3, 8, 64), (16, 3, 6)])
def test_norm_and_rotate(side, rows, heads, size):
    """Against complex numbers in float64: pair (i, i + size / 2) times e to the i angle."""
    rng = np.random.default_rng(size)
    x = 3 * rng.standard_normal((rows, heads, size))
    weight, angles = rng.standard_normal(size), rng.uniform(-9, 9, (rows, size // 2))
    cos, sin = np.cos(angles), np.sin(angles)
    rotation = np.stack([np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1)])
    given = [torch.from_numpy(part.astype(np.float32)) for part in (x, weight, rotation)]
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 0.01) * weight
    turned = (normed[..., : size // 2] + 1j * normed[..., size // 2 :]) * np.exp(1j * angles)[:, None]
    found = side.norm_and_rotate(given[0], given[1], 0.01)
    np.testing.assert_allclose(found.numpy(), normed, atol=1e-5, rtol=1e-5)
    found = side.norm_and_rotate(given[0], given[1], 0.01, given[2])
    np.testing.assert_allclose(found.numpy(), np.concatenate([turned.real, turned.imag], -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("groups", "shared", "size"), [(2, 4, 64), (1, 3, 6), (8, 1, 16)])
def test_attend(side, groups, shared, size):
    """Rows of unequal length, against numpy in float64; what lies behind a row's length is never seen."""
    rng = np.random.default_rng(size)
    lengths, room = [0, 5, 22, 21], 24
    rows, heads = len(lengths), groups * shared
    q, k, v = (rng.standard_normal((rows, n, size)) for n in (heads, groups, groups))
    cache = rng.standard_normal((2, rows, groups, room, size))
    for row, length in enumerate(lengths):
        cache[:, row, :, length:] = 1e9
    keys, values = torch.from_numpy(cache.astype(np.float32))
    given = [torch.from_numpy(part.astype(np.float32)) for part in (q, k, v)]
    found = side.attend(*given, keys, values, torch.tensor(lengths), 23)
    assert found.shape == (rows, heads * size)
    for row, length in enumerate(lengths):
        cache[0, row, :, length], cache[1, row, :, length] = k[row], v[row]
        for head in range(heads):
            own_keys, own_values = cache[:, row, head // shared, : length + 1]
            share = np.exp(own_keys @ q[row, head] / np.sqrt(size))
            wanted = share @ own_values / share.sum()
            np.testing.assert_allclose(found[row].view(heads, size)[head].numpy(), wanted, atol=2e-5)
    np.testing.assert_allclose(keys.numpy(), cache[0], rtol=1e-6)
    np.testing.assert_allclose(values.numpy(), cache[1], rtol=1e-6)


def test_attend_leaves_no_cache():
    if library.why_absent:
        pytest.skip(f"csrc: {library.why_absent}")
    q, cache = torch.zeros(2, 4, 8), torch.zeros(2, 2, 5, 8)
    k = torch.zeros(2, 2, 8)
    for lengths, longest, words in (([1, 5], 6, "room for 5 tokens"), ([1, 3], 3, "below"), ([-1, 0], 1, "below")):
        with pytest.raises(ValueError, match=words):
            ops.attend(q, k, k, cache, cache.clone(), torch.tensor(lengths), longest)
    with pytest.raises(ValueError, match="share the groups evenly"):
        ops.attend(torch.zeros(2, 3, 8), k, k, cache, cache.clone(), torch.tensor([1, 1]), 2)
