"""DNSMOS: how good it sounds."""

from collections.abc import Sequence

import numpy as np

from ...registry import JUDGES
from ..judge import Judge, Verdicts


@JUDGES.register
class Dnsmos(Judge):
    name = "dnsmos"
    measures = "quality"
    about = "DNSMOS's overall rating, 1 to 5"
    worst = 1.0
    package, module = "speechmos", "speechmos"

    def load(self, model: str) -> Verdicts:
        from speechmos import dnsmos  # pyright: ignore[reportMissingImports]

        def rate(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[float]:
            # It refuses samples beyond 1, which resampling makes of a full scale.
            return [float(dnsmos.run(np.clip(wave, -1, 1), sr=self.rate)["ovrl_mos"]) for wave in waves]

        return rate
