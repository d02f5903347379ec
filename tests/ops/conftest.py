"""What the tests of kernels share: each runs with vector instructions, without, and in torch code."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from megatron_soda import ops
from megatron_soda.ops import library

SIDES = ["simd", "plain", "torch"]


class Side:
    """The functions of megatron_soda.ops on one side: csrc with or without SIMD, or without csrc."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str):
        if function == "Stream":
            return lambda *tables, **how: SimpleNamespace(windows=self._here(ops.Stream(*tables, **how).windows))
        return self._here(getattr(ops, function))

    def _here(self, function: Callable):
        def call(*arguments, **more):
            if self.name == "torch":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(library, "find", lambda *_: None)
                    return function(*arguments, **more)
            library.set_simd(self.name == "simd")
            try:
                return function(*arguments, **more)
            finally:
                library.set_simd(True)

        return call


@pytest.fixture(scope="module", params=SIDES)
def side(request) -> Side:
    if request.param != "torch" and library.why_absent:
        pytest.skip(f"csrc: {library.why_absent}")
    return Side(request.param)
