"""A CUDA device that computes on the CPU, to find where tensors of two devices meet without having a device.

Tensors lie in the CPU's memory and hold their true values, so code that looks at values runs as well. A mark on a
tensor's storage says that it pretends to be on the device. A mode over torch's functions answers questions about the
device (`x.device`, `x.is_cuda`) and accepts requests for it (`device="cuda"`, `x.to(device)`). A mode over torch's
operations raises MismatchError where a real device would refuse the operands. Both also see the backward pass.

Use `with pretended(): ...` in a process of its own, before megatron is imported. Other threads see tensors of the CPU.
csrc's and Triton's kernels cannot be called.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_", "lift_fresh"}
TAKES_A_NUMBER = {"fill_", "index_fill_", "masked_fill_", "masked_fill", "where", "_foreach_mul_", "_foreach_div_"}


class MismatchError(RuntimeError):
    """What a real device would refuse."""


class Marks:
    """Which storages are on the device. A weak reference keeps the address of a storage from being used again."""

    def __init__(self) -> None:
        self.of: dict[int, StorageWeakRef] = {}
        self.wanted: bool | None = None  # whether what a function makes is to be on the device; None: as its operands
        self.copied: list[tuple[list[int], bool]] = []  # to the device: the shape, whether the host need not wait

    def __contains__(self, tensor: Tensor) -> bool:
        return _real_device(tensor).type == "cpu" and _storage(tensor)._cdata in self.of

    def put(self, tensor: Tensor) -> None:
        if _real_device(tensor).type != "cpu":
            return
        if len(self.of) > 20_000:
            self.of = {key: ref for key, ref in self.of.items() if not ref.expired()}
        storage = _storage(tensor)
        self.of[storage._cdata] = StorageWeakRef(storage)

    @contextlib.contextmanager
    def making(self, wanted: bool | None) -> Iterator[None]:
        before, self.wanted = self.wanted, wanted
        try:
            yield
        finally:
            self.wanted = before


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _real_device(tensor: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return tensor.device


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def is_cuda(device: Any) -> bool | None:
    """None: no device, or one that is neither (meta)."""
    if device is None or isinstance(device, bool):
        return None
    if isinstance(device, int):
        return True
    kind = torch.device(device).type
    return True if kind == "cuda" else False if kind == "cpu" else None


class Operations(TorchDispatchMode):
    """Refuses operands on two devices, and marks what is made."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        on = [t in self.marks for t in given]
        self._check(func, given, on)
        made = func(*args, **kwargs)
        wanted = self.marks.wanted
        if wanted or (wanted is None and any(on)):
            fresh = func.overloadpacket.__name__ == "lift_fresh"  # what torch.tensor() has just made
            old = {_storage(t)._cdata for t in given if _real_device(t).type == "cpu" and not fresh}
            for tensor in tensors(made):
                if _real_device(tensor).type == "cpu" and _storage(tensor)._cdata not in old:
                    self.marks.put(tensor)
        return made

    def _check(self, func: Any, given: list[Tensor], on: list[bool]) -> None:
        name = func.overloadpacket.__name__
        if all(on) or not any(on) or name in MAY_MIX or func.namespace == "c10d":
            return
        numbers = torch.Tag.pointwise in func.tags or name in TAKES_A_NUMBER
        off = [t for t, is_on in zip(given, on, strict=True) if not is_on and not (numbers and t.dim() == 0)]
        off = [t for t in off if _real_device(t).type == "cpu"]
        if off:
            shapes = [f"{tuple(t.shape)} on {'cuda' if is_on else 'cpu'}" for t, is_on in zip(given, on, strict=True)]
            raise MismatchError(f"{func}: operands on two devices: {', '.join(shapes)}")


class Functions(TorchFunctionMode):
    """Answers and requests: no function of torch sees the word cuda."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks
        T: Any = torch.Tensor  # noqa: N806
        self.special: dict[Any, Any] = {
            T.device.__get__: lambda t, *_: CUDA if t in marks else _real_device(t),
            T.is_cuda.__get__: lambda t, *_: t in marks,
            T.is_cpu.__get__: lambda t, *_: _real_device(t).type == "cpu" and t not in marks,
            T.get_device: lambda t: 0 if t in marks else -1,
            T.type: self._type,
            T.numpy: lambda t, *a, **k: self._leave(t).numpy(*a, **k),
            T.__array__: lambda t, *a, **k: self._leave(t).__array__(*a, **k),
            T.to: self._to,
            T.new_tensor: self._new_tensor,
            T.cuda: lambda t, *_, **k: self._move(t, True),
            T.cpu: lambda t, *_, **k: self._move(t, False),
            T.pin_memory: self._pin,
            T.is_pinned: lambda t, *_: getattr(t, "pinned", False),
            torch.addmm: self._addmm,
            torch._C._nn._parse_to: torch._C._nn._parse_to,  # these two answer with the device they were given
            torch.device: torch.device,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (special := self.special.get(func)) is not None:
            return special(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        wanted = is_cuda(kwargs.get("device"))
        if wanted:
            kwargs["device"] = CPU
        for at, value in enumerate(args):
            if isinstance(value, torch.device):
                wanted = is_cuda(value)
                args = (*args[:at], CPU if wanted else value, *args[at + 1 :])
        generator = kwargs.get("generator")
        if generator is not None:
            self._check_generator(func, generator, args, wanted)
        if wanted is None:
            return func(*args, **kwargs)
        with self.marks.making(wanted):
            return func(*args, **kwargs)

    def _check_generator(self, func: Any, generator: Any, args: Any, wanted: bool | None) -> None:
        on = wanted or (wanted is None and any(isinstance(a, Tensor) and a in self.marks for a in args))
        if on != getattr(generator, "pretends", False):
            raise MismatchError(f"{func.__name__}: a generator of the other device")

    def _leave(self, tensor: Tensor) -> Tensor:
        if tensor in self.marks:
            raise MismatchError(f"{tuple(tensor.shape)} is on cuda: copy it to host memory first")
        return tensor

    def _type(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor.type(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and tensor in self.marks else found

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        pinned = self._leave(tensor).clone()
        pinned.pinned = True  # pyright: ignore[reportAttributeAccessIssue]
        return pinned

    def _move(self, tensor: Tensor, to_cuda: bool) -> Tensor:
        if (tensor in self.marks) == to_cuda:
            return tensor
        with self.marks.making(to_cuda):
            return tensor.to(CPU, copy=True)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            wanted, rest = other in self.marks, (CPU, other.dtype, *args[1:])
        elif isinstance(other, str | torch.device | int):
            wanted, rest = is_cuda(other), (CPU if is_cuda(other) else other, *args[1:])
        else:
            wanted, rest = is_cuda(kwargs.get("device")), args
            if wanted:
                kwargs["device"] = CPU
        if wanted is None or _real_device(tensor).type != "cpu":
            return tensor.to(*rest, **kwargs)
        if wanted and tensor not in self.marks:
            no_wait = getattr(tensor, "pinned", False) and bool(kwargs.get("non_blocking"))
            self.marks.copied.append((list(tensor.shape), no_wait))
        with self.marks.making(wanted):
            return tensor.to(*rest, **{**kwargs, **({"copy": True} if (tensor in self.marks) != wanted else {})})

    def _new_tensor(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", CUDA if tensor in self.marks else CPU)
        with self.marks.making(is_cuda(device)):
            return tensor.new_tensor(*args, **kwargs)

    def _addmm(self, total: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        dtype, out = kwargs.pop("out_dtype", None), kwargs.pop("out", None)
        if dtype is None:
            return torch.addmm(total, a, b, **kwargs, **({} if out is None else {"out": out}))
        found = torch.addmm(total.to(dtype), a.to(dtype), b.to(dtype), **kwargs)
        return found if out is None else out.copy_(found)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.pretends = bool(is_cuda(device))
        return made

    def manual_seed(self, seed: int) -> Any:  # torch's answers with another object
        super().manual_seed(seed)
        return self


class Stream:
    """Everything is done when it is asked for."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> "Stream":
        return self


_PROPERTIES = SimpleNamespace(
    name="fake", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, uuid="0", warp_size=32
)


def _answers() -> dict[str, Any]:
    fixed = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_name": "fake",
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "_lazy_init": None,
    }
    answers: dict[str, Any] = {name: (lambda *_, value=value, **__: value) for name, value in fixed.items()}
    for name in ("current_stream", "default_stream"):
        answers[name] = lambda *_, **__: Stream()
    for name in ("stream", "device"):
        answers[name] = lambda *_, **__: contextlib.nullcontext()
    answers["get_rng_state"] = lambda *_, **__: torch.get_rng_state()
    answers["set_rng_state"] = lambda state, *_, **__: torch.set_rng_state(state)
    answers["Stream"] = answers["Event"] = Stream
    for name, dtype in {"FloatTensor": torch.float, "IntTensor": torch.int, "LongTensor": torch.long}.items():
        answers[name] = lambda values, dtype=dtype: torch.tensor(values, dtype=dtype, device=CUDA)
    answers["default_generators"] = (SimpleNamespace(get_state=torch.get_rng_state, set_state=torch.set_rng_state),)
    return answers


COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce")


def _distributed(marks: Marks) -> dict[str, Any]:
    """NCCL is gloo here, but takes tensors of the device alone, as the real one."""
    of_cpu: list[Any] = []
    init, new_group = dist.init_process_group, dist.new_group

    def group(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("backend", None)
        made = new_group(*args, backend="gloo", **kwargs)
        if wanted == "gloo":
            of_cpu.append(made)
        return made

    def checked(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            on_cpu = any(g in of_cpu for g in (*args, *kwargs.values()) if isinstance(g, dist.ProcessGroup))
            if any((t in marks) == on_cpu for t in tensors((args, kwargs))):
                raise MismatchError(f"{name}: a tensor of the other device than the group's")
            return original(*args, **kwargs)

        return call

    return {
        "init_process_group": lambda _backend=None, **kwargs: init("gloo", **kwargs),
        "new_group": group,
        "get_backend": lambda group=None: "gloo" if group in of_cpu else "nccl",
        **{name: checked(name) for name in COLLECTIVES},
    }


@contextlib.contextmanager
def pretended() -> Iterator[Marks]:
    marks = Marks()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_answers()))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", return_value=(2, 28, 9)))
        stack.enter_context(mock.patch.multiple(dist, **_distributed(marks)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        stack.enter_context(Operations(marks))
        stack.enter_context(Functions(marks))
        yield marks
