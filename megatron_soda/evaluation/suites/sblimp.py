"""sBLIMP: grammatical sentences."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, language_pairs
from ..pairs import PairSuite


@SUITES.register
class Sblimp(PairSuite):
    name = "sblimp"
    title = "sBLIMP: grammatical sentences"
    about = "Of two spoken sentences, how often the model finds the grammatical one more likely. Chance is .5."

    def read(self, folder: Path) -> list[Pair]:
        return language_pairs(folder, "sentences")
