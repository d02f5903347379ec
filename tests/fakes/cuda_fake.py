"""A CUDA device for those who only ask whether there is one: Transformer Engine, when it makes its modules.

Nothing runs on it. Transformer Engine's tensors are made on the CPU, as megatron_soda.parallel.cpu has it for
megatron-core.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

CAPABILITY = 9, 0  # a Hopper, the oldest that has all recipes of ours
_DEVICE = SimpleNamespace(
    name="fake", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=80 << 30, multi_processor_count=132
)


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, torch says that there is one device. To be entered after megatron_soda.parallel.cpu is installed."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": _DEVICE,
        "get_device_capability": CAPABILITY,
    }
    with mock.patch.multiple(torch.cuda, **{k: lambda *_, v=v, **__: v for k, v in answers.items()}):
        yield


def on_the_cpu() -> None:
    """Has megatron_soda.parallel.cpu treat Transformer Engine as it treats megatron-core, from now on."""
    from megatron_soda.parallel import cpu

    packages = "megatron.", "transformer_engine."
    cpu._called_by_megatron = lambda: sys._getframe(2).f_globals.get("__name__", "").startswith(packages)
