"""Kernels for packed audio codes, windows, batches, packing, checks and decoding: C++ and CUDA where built, otherwise
torch.

Every function checks its arguments, then calls the op in csrc/ (torch.ops.megatron_soda) or the function of the same
name in `reference`, which gives the same values (or perhaps a different error for damaged tables). `library.why_absent`
says why csrc is not used.

Wrong types raise TypeError; wrong shapes, devices or values raise ValueError. Tensors must be contiguous. The first
four functions take CPU or CUDA tensors, the others CPU tensors.
"""

import torch
from torch import Tensor

from . import library, reference

__all__ = [
    "Stream",
    "attend",
    "best_fit",
    "build_batch",
    "first_illegal",
    "hash_documents",
    "linear",
    "norm_and_rotate",
    "pack_frames",
    "quantise_rows",
    "unpack_frames",
]

_PREFIX = "megatron_soda: "  # prefix of every error message that csrc raises
_ID_LIMIT = 2**31
CAPACITY_LIMIT = 2**24

library.load()


def pack_frames(codes: Tensor, bits: int) -> Tensor:
    """Codes int16 or int32 (frames, slots) -> uint8 (frames, ceil(slots * bits / 8)).

    Code k occupies bits [k * bits, (k + 1) * bits) of its frame, least significant first; every frame begins at a byte.
    `bits` is 1 to 24. Raises ValueError for a code outside [0, 2**bits), naming the first.
    """
    _tensor("codes", codes, (torch.int16, torch.int32), 2)
    _between("bits", bits, 1, 24)
    return _run("pack_frames", codes, bits)


def unpack_frames(packed: Tensor, slots: int, bits: int) -> Tensor:
    """The inverse of `pack_frames`: uint8 (frames, ceil(slots * bits / 8)) -> int32 (frames, slots)."""
    _tensor("packed", packed, (torch.uint8,), 2)
    _width("packed", packed, slots, bits)
    return _run("unpack_frames", packed, slots, bits)


class Stream:
    """A compact token stream: text tokens (everything but audio codes) with runs of whole audio frames between them.

    text     uint8 (groups, text_bits)  ids of `text_bits` bits, packed as by `pack_frames` in frames of 8
    frames   uint8 (frames, ceil(slots * bits / 8))  packed as by `pack_frames`
    starts   int64 (runs + 1,)  the token at which each run begins; the last is the number of tokens
    firsts   int64 (runs + 1,)  the first frame of each run; the last is the number of frames

    Run i has frames firsts[i] .. firsts[i + 1] - 1, so slots times as many tokens. Code c of slot k is the id
    audio_base + entries * k + c. Tables are only read where needed: they may be huge, and come from damaged files.
    """

    def __init__(
        self,
        text: Tensor,
        frames: Tensor,
        starts: Tensor,
        firsts: Tensor,
        *,
        slots: int,
        bits: int,
        text_bits: int,
        audio_base: int,
        entries: int,
    ) -> None:
        _tensor("text", text, (torch.uint8,), 2)
        _tensor("frames", frames, (torch.uint8,), 2, text.device)
        _tensor("starts", starts, (torch.int64,), 1, text.device)
        _tensor("firsts", firsts, (torch.int64,), 1, text.device)
        _width("frames", frames, slots, bits)
        _width("text", text, 8, text_bits)
        if len(starts) != len(firsts) or not len(starts):
            raise ValueError(
                f"starts and firsts must be equally long, at least 1; they have {len(starts)} and {len(firsts)} entries"
            )
        _between("audio_base", audio_base, 0, _ID_LIMIT)
        _between("entries", entries, 0, _ID_LIMIT)
        if audio_base + entries * (slots - 1) + 2**bits > _ID_LIMIT:
            raise ValueError(f"audio_base={audio_base} and entries={entries} make ids over int32")
        self._tables = text, frames, starts, firsts
        self._sizes = slots, bits, text_bits, audio_base, entries

    def windows(self, begins: Tensor, length: int) -> Tensor:
        """int32 ids (windows, length): window w is tokens begins[w], begins[w] + 1, .. begins: int64 (windows,).

        Reads only the part of the tables that the windows need. Raises ValueError, naming the window, if it leaves the
        stream or if the tables lead outside `text` or `frames`.
        """
        _tensor("begins", begins, (torch.int64,), 1, self._tables[0].device)
        _between("length", length, 1, 2**31 - 1)
        return _run("expand_windows", *self._tables, begins, length, *self._sizes)


def build_batch(
    ids: Tensor,
    counts: Tensor,
    classes: Tensor,
    weights: Tensor,
    eos: int,
    reset_positions: bool,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Turns windows of ids into the tensors of `data.batch.Batch`, in its order.

    ids      int32 (sequences, length + 1)
    counts   int64 (sequences,)  labels from this position on have loss weight 0
    classes  uint8 (vocabulary,)  the class of every id
    weights  float32 (classes,)  the loss weight of each class
    label_weights  float32 (sequences, length)  multiply those of their labels' classes; None: no label has one

    Returns tokens, labels int64, loss_weight float32, class_id, segment_id, position_id int64, all (sequences, length),
    and cu_seqlens int32 (segments + 1,). A segment starts with each sequence and after each `eos`; position_id counts
    from the start of the segment if `reset_positions`, otherwise of the sequence. Raises ValueError if an id is outside
    [0, vocabulary), giving the smallest and largest, or if a class has no weight.
    """
    _tensor("ids", ids, (torch.int32,), 2)
    _tensor("counts", counts, (torch.int64,), 1, ids.device)
    _tensor("classes", classes, (torch.uint8,), 1, ids.device)
    _tensor("weights", weights, (torch.float32,), 1, ids.device)
    _integer("eos", eos)
    if len(ids) < 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be (sequences, length + 1), 1 sequence and length 1 at least, not {_shape(ids)}")
    if len(counts) != len(ids):
        raise ValueError(f"counts must be ({len(ids)},), one per sequence of ids, not {_shape(counts)}")
    if len(ids) * ids.shape[1] >= 2**30:
        raise ValueError(f"ids must have fewer than 2**30 elements, not {_shape(ids)}")
    if label_weights is not None:
        _tensor("label_weights", label_weights, (torch.float32,), 2, ids.device)
        if label_weights.shape != (len(ids), ids.shape[1] - 1):
            raise ValueError(
                f"label_weights must be ({len(ids)}, {ids.shape[1] - 1}), one per label of ids, not "
                f"{_shape(label_weights)}"
            )
    return _run("build_batch", ids, counts, classes, weights, eos, bool(reset_positions), label_weights)


def best_fit(lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Best-fit decreasing: packs documents into bins of `capacity` (1 to 2**24).

    lengths int32 or int64 (n,) -> order int64 (n,), offsets int64 (bins + 1,): bin b has documents order[offsets[b] :
    offsets[b + 1]], in the order they were placed.

    Documents are placed longest first, equally long ones in order. Each goes into the bin with the least remaining room
    that fits it (of several, the one that reached this room last), or opens a new bin. Raises ValueError for a length
    outside 1 .. capacity, naming the first such document.
    """
    _tensor("lengths", lengths, (torch.int32, torch.int64), 1, torch.device("cpu"))
    _between("capacity", capacity, 1, CAPACITY_LIMIT)
    if len(lengths) >= 2**31:
        raise ValueError(f"lengths must have fewer than 2**31 elements; it has {len(lengths)}")
    order, offsets = _run("best_fit", lengths, capacity)
    return order, offsets


def first_illegal(ids: Tensor, offsets: Tensor, kinds: Tensor, step: Tensor, start: int, end: int) -> Tensor:
    """Runs a finite automaton over every document ids[offsets[d] : offsets[d + 1]] -> int64 (documents,).

    ids      int32 (tokens,)
    offsets  int64 (documents + 1,)  never falling, within 0 .. tokens
    kinds    int8 (vocabulary,)  the kind of every id, in [0, n_kinds)
    step     int8 (states, n_kinds)  the next state, or negative where the kind is illegal

    -1: the document is legal and ends in state `end`. Otherwise, the index within the document of the first illegal
    token (an id outside the vocabulary is illegal), or the document's length if it ends in another state.
    """
    cpu = torch.device("cpu")
    _tensor("ids", ids, (torch.int32,), 1, cpu)
    _offsets(offsets, len(ids))
    _tensor("kinds", kinds, (torch.int8,), 1, cpu)
    _tensor("step", step, (torch.int8,), 2, cpu)
    states, n_kinds = step.shape
    if not 1 <= states <= 127 or not 1 <= n_kinds <= 127:
        raise ValueError(f"step must be (states, n_kinds), each 1 to 127, not {_shape(step)}")
    if int(step.max()) >= states:
        raise ValueError(f"step holds state {int(step.max())}, but there are {states} states")
    if len(kinds) and not 0 <= int(kinds.min()) <= int(kinds.max()) < n_kinds:
        raise ValueError(f"kinds must lie in [0, {n_kinds}), found {int(kinds.min())} to {int(kinds.max())}")
    _between("start", start, 0, states - 1)
    _between("end", end, 0, states - 1)
    return _run("first_illegal", ids, offsets, kinds, step, start, end)


def hash_documents(ids: Tensor, offsets: Tensor) -> Tensor:
    """A 64-bit hash of every document ids[offsets[d] : offsets[d + 1]] -> int64 (documents,).

    ids int32 (tokens,); offsets int64 (documents + 1,), never falling, within 0 .. tokens. With s = SplitMix64's output
    function the hash is s(sum over positions p of s(id + ((p + 1) << 32)) xor the length), modulo 2**64.
    """
    _tensor("ids", ids, (torch.int32,), 1, torch.device("cpu"))
    _offsets(offsets, len(ids))
    return _run("hash_documents", ids, offsets)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Products of a few vectors with a matrix: float32 x (rows, in) -> float32 (rows, out).

    weight  float32, bfloat16 or int8 (out, in)
    scale   float32 (out,), for int8 weights alone: row o of the matrix is scale[o] * weight[o], as by `quantise_rows`

    Sums are in float32. With int8 weights, x is rounded to integers of 16 bits, or fewer where sums would not fit in 32
    bits (from 512 columns on): x / s with s = max |x| / limit in each row, limit = min(32767, (2**31 - 1) // (128 *
    in)). So the result is the same whatever does the work. It is only meant for decoding: x has no gradient.
    """
    cpu = torch.device("cpu")
    _tensor("x", x, (torch.float32,), 2, cpu)
    _tensor("weight", weight, (torch.float32, torch.bfloat16, torch.int8), 2, cpu)
    if weight.shape[1] != x.shape[1] or not 1 <= x.shape[1] <= 2**22:
        raise ValueError(f"x and weight must have the same columns, 1 to 2**22, not {_shape(x)} and {_shape(weight)}")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError("int8 weights need a scale, others must not have one")
    if scale is not None:
        _tensor("scale", scale, (torch.float32,), 1, cpu)
        if len(scale) != len(weight):
            raise ValueError(f"scale must be ({len(weight)},), one per row of weight, not {_shape(scale)}")
    return _run("linear", x, weight, scale)


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None = None) -> Tensor:
    """RMS norm over the last dimension of x (rows, heads, size), times weight (size,); then, if `rotation` is given,
    each pair (i, i + size / 2) is turned by its row's angle.

    rotation (2, rows, size): cosines, and sines of which the first half is negative. All of one dtype; csrc has
    float32 on a CPU. Norms are computed in float32, everything else in the dtype.
    """
    _floats("x", x, 3)
    _floats("weight", weight, 1)
    if x.dtype != torch.float32:
        return reference.norm_and_rotate(x, weight, eps, rotation)
    return _run("norm_and_rotate", x, weight, eps, rotation)


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Adds a token to every row of a cache, and attends to all of the row: -> (rows, heads * size).

    q              (rows, heads, size); each of the groups is shared by heads / groups heads in succession
    k, v           (rows, groups, size), go to place lengths[row] of the cache
    keys, values   (rows, groups, room, size), the cache
    lengths        int64 (rows,), tokens before this one, below `longest`, which the room must be enough for

    All of one dtype; csrc has float32 on a CPU.
    """
    _floats("q", q, 3)
    _floats("keys", keys, 4)
    if q.dtype != torch.float32:
        return reference.attend(q, k, v, keys, values, lengths, longest)
    return _run("attend", q, k, v, keys, values, lengths, longest)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of floats (out, in) -> int8 (out, in) in -127 .. 127 and float32 (out,): scale[o] * q[o] is as near to
    row o as multiples of scale[o] = max |row| / 127 are."""
    rows = weight.float()
    scale = rows.abs().amax(1) / 127
    return (rows / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def _run(name: str, first: Tensor, *rest):
    """The op, if csrc has it for the tensor's device, otherwise the reference."""
    op = library.find(name, first.device.type)
    if op is None:
        return getattr(reference, name)(first, *rest)
    try:
        return op(first, *rest)
    except RuntimeError as error:
        message = str(error)
        if not message.startswith(_PREFIX):
            raise
        raise ValueError(message.removeprefix(_PREFIX)) from None


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _tensor(
    name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], dimensions: int, device: torch.device | None = None
) -> None:
    """`device` None: any device that the ops can run on."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, not {str(value.dtype).removeprefix('torch.')}")
    if device is None and value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on a CPU or a CUDA device, not on {value.device}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, not on {value.device}")
    if value.dim() != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension{'s'[: dimensions - 1]}, not shape {_shape(value)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not strided {value.stride()}")


def _floats(name: str, value: Tensor, dimensions: int) -> None:
    _tensor(name, value, (torch.float32, torch.bfloat16, torch.float16), dimensions)


def _integer(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def _between(name: str, value: int, low: int, high: int) -> None:
    _integer(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {value}")


def _width(name: str, packed: Tensor, slots: int, bits: int) -> None:
    _between("slots", slots, 1, 2**24)
    _between("bits", bits, 1, 24)
    width = (slots * bits + 7) // 8
    if packed.shape[1] != width:
        raise ValueError(f"{name} must be (frames, {width}) for {slots} slots of {bits} bits, not {_shape(packed)}")


def _offsets(offsets: Tensor, tokens: int) -> None:
    _tensor("offsets", offsets, (torch.int64,), 1, torch.device("cpu"))
    if not len(offsets):
        raise ValueError("offsets must have at least one entry")
    if int(offsets[0]) < 0 or int(offsets[-1]) > tokens or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets must never fall and lie within 0 to {tokens}, the number of ids")
