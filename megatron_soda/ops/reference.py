"""The ops of csrc/ in torch, numpy and Python: used where csrc is not built, and as the reference in its tests.

The package's functions have already checked the arguments. The first four functions work on any device.
"""

from bisect import bisect_left, insort

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def pack_frames(codes: Tensor, bits: int) -> Tensor:
    codes = codes.int()  # 2**bits may be too large for int16
    wrong = (codes < 0) | (codes > 2**bits - 1)
    if bool(wrong.any()):
        frame, slot = wrong.nonzero()[0].tolist()
        raise ValueError(f"codes[{frame}, {slot}] is {int(codes[frame, slot])}, not in [0, {2**bits})")
    frames, slots = codes.shape
    width = (slots * bits + 7) // 8
    packed = codes.new_zeros(frames, width + 3, dtype=torch.uint8)  # three bytes more: a code touches up to four
    for slot in range(slots):
        byte, shift = divmod(slot * bits, 8)
        code = codes[:, slot] << shift
        for i in range(4):
            packed[:, byte + i] |= (code >> 8 * i & 255).to(torch.uint8)
    return packed[:, :width].contiguous()


def unpack_frames(packed: Tensor, slots: int, bits: int) -> Tensor:
    first = torch.arange(slots, device=packed.device) * bits
    return _codes(
        packed.reshape(-1), torch.arange(len(packed), device=packed.device)[:, None] * packed.shape[1], first, bits
    )


def _codes(plane: Tensor, frame: Tensor, bit: Tensor, bits: int) -> Tensor:
    """int32 codes at bit `bit` of the frames that begin at byte `frame` of the plane; the two are broadcast."""
    byte, last = frame + (bit >> 3), max(len(plane) - 1, 0)
    code = plane[byte].long()
    for i in range(1, (bits + 14) // 8):  # bits beyond the last byte are masked, whatever is read for them
        code = code | plane[(byte + i).clamp(max=last)].long() << 8 * i
    return (code >> (bit & 7) & (2**bits - 1)).int()


def expand_windows(
    text: Tensor,
    frames: Tensor,
    starts: Tensor,
    firsts: Tensor,
    begins: Tensor,
    length: int,
    slots: int,
    bits: int,
    text_bits: int,
    audio_base: int,
    entries: int,
) -> Tensor:
    total = max(int(starts[-1]), 0)
    outside = (begins < 0) | (begins > total - length)
    if bool(outside.any()):
        window = int(outside.nonzero()[0])
        raise ValueError(
            f"window {window}: {length} tokens from token {int(begins[window])} on are not within the {total} tokens"
        )
    token = begins[:, None] + torch.arange(length, device=begins.device)
    run = torch.searchsorted(starts[:-1], token, right=True) - 1
    there = run >= 0
    start, first = (torch.where(there, table[run.clamp(min=0)], 0) for table in (starts, firsts))
    end = torch.where(there, firsts[run + 1], 0)
    damaged = (start < 0) | (first < 0) | (end < first) | (end > len(frames))
    count = torch.where(damaged, 0, slots * (end - first))
    damaged |= there & (start + count > starts[run + 1])
    audio = there & (token < start + count)
    text_index = token - torch.where(damaged, 0, slots * end)
    damaged |= ~audio & ((text_index < 0) | (text_index >= 8 * len(text)))
    if bool(damaged.any()):
        window = int(damaged.any(1).nonzero()[0])
        raise ValueError(f"window {window}: its runs lead outside the tables or the planes: the data are damaged")
    ids = torch.zeros_like(token)
    words, past = text_index[~audio], (token - start)[audio]
    ids[~audio] = _codes(text.reshape(-1), words // 8 * text_bits, words % 8 * text_bits, text_bits).long()
    frame, slot = first[audio] + past // slots, past % slots
    codes = _codes(frames.reshape(-1), frame * frames.shape[1], slot * bits, bits)
    ids[audio] = audio_base + entries * slot + codes
    return ids.int()


def build_batch(
    ids: Tensor,
    counts: Tensor,
    classes: Tensor,
    weights: Tensor,
    eos: int,
    reset_positions: bool,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(classes):
        raise ValueError(f"ids must lie in [0, {len(classes)}), found {low} to {high}")
    ids = ids.long()
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    sequences, length = tokens.shape
    class_id = classes[labels].long()
    if int(class_id.max()) >= len(weights):
        raise ValueError(f"classes must lie in [0, {len(weights)}), the number of weights; found {int(class_id.max())}")
    breaks = torch.zeros_like(tokens)
    breaks[:, 1:] = tokens[:, :-1] == eos  # a segment starts after EOS
    starts = breaks.bool()
    starts[:, 0] = True
    loss_weight = weights[class_id] if label_weights is None else weights[class_id] * label_weights
    position = torch.arange(length, device=ids.device).expand(sequences, length)
    return (
        tokens,
        labels,
        loss_weight.masked_fill_(position >= counts[:, None], 0.0),
        class_id,
        breaks.cumsum(1),
        (position - (position * starts).cummax(1)[0]) if reset_positions else position.clone(),
        torch.cat([starts.flatten().nonzero()[:, 0], starts.new_tensor([tokens.numel()], dtype=torch.int64)]).int(),
    )


def best_fit(lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    wrong = (lengths < 1) | (lengths > capacity)
    if bool(wrong.any()):
        document = int(wrong.nonzero()[0])
        raise ValueError(f"lengths[{document}] is {int(lengths[document])}, not in 1 to {capacity}")
    sizes = lengths.numpy()
    bins: list[list[int]] = []
    stacks: dict[int, list[int]] = {}  # room left -> the bins with that much room, the latest at the end
    rooms: list[int] = []  # the keys of `stacks`, sorted
    for document in np.argsort(-sizes.astype(np.int64), kind="stable").tolist():
        size = int(sizes[document])
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            chosen = stacks[room].pop()
            if not stacks[room]:
                del stacks[room], rooms[place]
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        left = room - size
        if left and left not in stacks:
            insort(rooms, left)
        if left:
            stacks.setdefault(left, []).append(chosen)
    order = torch.tensor([document for one in bins for document in one], dtype=torch.int64)
    return order, torch.tensor([0, *np.cumsum([len(one) for one in bins])], dtype=torch.int64)


def first_illegal(ids: Tensor, offsets: Tensor, kinds: Tensor, step: Tensor, start: int, end: int) -> Tensor:
    states, n_kinds = step.shape
    table = np.full((states + 1, n_kinds + 1), states, np.int64)  # the last state is the error state, the last kind
    table[:-1, :-1] = np.where(step.numpy() < 0, states, step.numpy())  # that of ids outside the vocabulary
    tokens, bounds = ids.numpy(), offsets.numpy()
    lengths = np.diff(bounds)
    found = np.full(len(lengths), -1, np.int64)
    state = np.full(len(lengths), start)
    alive = np.flatnonzero(lengths)
    position = 0
    while len(alive):  # all documents, one token per round
        token = tokens[bounds[alive] + position]
        known = (token >= 0) & (token < len(kinds))
        kind = np.full(len(token), n_kinds)
        kind[known] = kinds.numpy()[token[known]]
        state[alive] = table[state[alive], kind]
        found[alive[state[alive] == states]] = position
        position += 1
        alive = alive[(state[alive] != states) & (lengths[alive] > position)]
    ends_elsewhere = (found < 0) & (state != end)
    return torch.from_numpy(np.where(ends_elsewhere, lengths, found))


def hash_documents(ids: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.numpy()
    lengths = np.diff(bounds)
    begin, stop = int(bounds[0]), int(bounds[-1])
    position = np.arange(1, stop - begin + 1) - np.repeat(bounds[:-1] - begin, lengths)
    tokens = ids.numpy()[begin:stop].astype(np.uint32).astype(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_splitmix64(tokens + (position.astype(np.uint64) << 32)))])
    total = sums[bounds[1:] - begin] - sums[bounds[:-1] - begin]  # wraps around, as intended
    return torch.from_numpy(_splitmix64(total ^ lengths.astype(np.uint64)).view(np.int64))


def linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x @ weight.float().T
    limit = torch.tensor(min(32767, (2**31 - 1) // (128 * x.shape[1])), dtype=torch.float32)
    largest = x.abs().amax(1, keepdim=True)
    integers = (x * torch.where(largest > 0, limit / largest, 0)).round()
    sums = integers.double() @ weight.double().T  # whole numbers, exact
    return sums.float() * (largest / limit * scale)


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None) -> Tensor:
    y = x.float()
    y = weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if rotation is None:
        return y
    cos, sin = rotation[:, :, None]
    return y * cos + y.roll(x.shape[-1] // 2, -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
    rows = torch.arange(len(q), device=q.device)
    keys[rows, :, lengths], values[rows, :, lengths] = k, v
    mask = (torch.arange(longest, device=q.device) <= lengths[:, None])[:, None, None]
    # The heads that share a group are its queries, so keys and values are not repeated.
    q = q.unflatten(1, (k.shape[1], -1))
    found = F.scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
    return found.flatten(1)


def _splitmix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al., 2014) of uint64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
