"""SALMon: acoustic consistency."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, salmon_pairs
from ..pairs import PairSuite


@SUITES.register
class Salmon(PairSuite):
    name = "salmon"
    title = "SALMon: acoustic consistency"
    about = (
        "Of a recording and one whose speaker, mood, room or background does not fit, how often the model finds "
        "the true one more likely. Chance is .5."
    )

    def read(self, folder: Path) -> list[Pair]:
        return salmon_pairs(folder)
