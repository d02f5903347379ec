"""NVIDIA DALI, as much of it as megatron_soda/audio/dali.py uses, with devices on the CPU.

Its functions take the real ones' arguments and no others, refuse operands on the wrong device, and give samples of the
same number and meaning: decoding by soundfile, resampling by soxr. tests/audio/test_dali.py runs the same on the real
package, on its CPU backend.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
import soundfile
import soxr

Batch = list[np.ndarray]


@dataclass
class Node:
    device: str
    compute: Callable[[dict[str, Batch]], Batch]

    def gpu(self) -> "Node":
        return Node("gpu", self.compute)


@dataclass
class TensorList:
    device: str
    batch: Batch

    def as_cpu(self) -> "TensorList":
        return TensorList("cpu", self.batch)

    def at(self, i: int) -> np.ndarray:
        assert self.device == "cpu", "a tensor on a GPU is no array"
        return self.batch[i]


class Pipeline:
    made: "list[Pipeline]"  # one list for each fake

    def __init__(
        self,
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None = None,
        prefetch_queue_depth: int = 2,
        exec_pipelined: bool = True,
        exec_async: bool = True,
    ):
        assert prefetch_queue_depth == 1 or not exec_pipelined, "run() would wait for more than one batch"
        self.batch_size, self.num_threads, self.device_id = batch_size, num_threads, device_id
        self.fed: dict[str, Batch] = {}
        self.outputs: tuple[Node, ...] = ()
        self.resampled_on: list[str] = []
        self.built = False
        self.made.append(self)

    def __enter__(self) -> Self:
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _entered.pop()

    def set_outputs(self, *outputs: Node) -> None:
        self.outputs = outputs

    def build(self) -> None:
        assert self.device_id is not None or all(node.device == "cpu" for node in self.outputs)
        self.built = True

    def feed_input(self, name: str, data: Batch) -> None:
        assert self.built
        assert len(data) <= self.batch_size
        self.fed[name] = data

    def run(self) -> tuple[TensorList, ...]:
        assert len({len(batch) for batch in self.fed.values()}) == 1
        return tuple(TensorList(node.device, node.compute(self.fed)) for node in self.outputs)


_entered: list[Pipeline] = []


def external_source(*, name: str, dtype: type, ndim: int) -> Node:
    def compute(fed: dict[str, Batch]) -> Batch:
        assert all(np.asarray(one).dtype == dtype and np.ndim(one) == ndim for one in fed[name])
        return fed[name]

    return Node("cpu", compute)


def decode(encoded: Node, *, dtype: type, downmix: bool) -> tuple[Node, Node]:
    assert (encoded.device, dtype, downmix) == ("cpu", np.float32, True), "DALI decodes sound on the CPU only"

    def compute(fed: dict[str, Batch], which: int) -> Batch:
        try:
            files = [
                soundfile.read(io.BytesIO(one.tobytes()), dtype="float32", always_2d=True)
                for one in encoded.compute(fed)
            ]
        except soundfile.LibsndfileError as error:
            raise RuntimeError(str(error)) from None
        return [
            samples.mean(1, dtype=np.float32) if which == 0 else np.array(rate, np.float32) for samples, rate in files
        ]

    return Node("cpu", lambda fed: compute(fed, 0)), Node("cpu", lambda fed: compute(fed, 1))


def filter_(waves: Node, filters: Node, *, border: str) -> Node:
    assert border == "constant"
    assert waves.device == filters.device

    def compute(fed: dict[str, Batch]) -> Batch:
        pairs = zip(waves.compute(fed), filters.compute(fed), strict=True)
        return [np.convolve(wave[0], taps[0], "same").astype(np.float32)[None] for wave, taps in pairs]

    return Node(waves.device, compute)


def reshape(waves: Node, *, shape: list[int]) -> Node:
    return Node(waves.device, lambda fed: [wave.reshape(shape) for wave in waves.compute(fed)])


def audio_resample(waves: Node, *, in_rate: Node, out_rate: float, quality: float) -> Node:
    assert in_rate.device == "cpu", "arguments come from the CPU"
    assert 0 <= quality <= 100
    _entered[-1].resampled_on.append(waves.device)

    def one(wave: np.ndarray, rate: float) -> np.ndarray:
        found = soxr.resample(wave, rate, out_rate, quality="HQ")
        return np.pad(found, (0, math.ceil(len(wave) * out_rate / rate) - len(found)))

    def compute(fed: dict[str, Batch]) -> Batch:
        return [one(*pair) for pair in zip(waves.compute(fed), map(float, in_rate.compute(fed)), strict=True)]

    return Node(waves.device, compute)


def modules() -> tuple[dict[str, Any], list[Pipeline]]:
    """What sys.modules is to hold, and a list that every pipeline joins."""
    fn: Any = ModuleType("nvidia.dali.fn")
    fn.external_source, fn.filter, fn.reshape, fn.audio_resample = external_source, filter_, reshape, audio_resample
    fn.decoders = SimpleNamespace(audio=decode)
    dali: Any = ModuleType("nvidia.dali")
    made: list[Pipeline] = []
    dali.fn, dali.types = fn, SimpleNamespace(FLOAT=np.float32, UINT8=np.uint8)
    dali.Pipeline = type("Pipeline", (Pipeline,), {"made": made})
    return {"nvidia": ModuleType("nvidia"), "nvidia.dali": dali, "nvidia.dali.fn": fn}, made
