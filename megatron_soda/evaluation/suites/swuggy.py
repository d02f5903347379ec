"""sWUGGY: words."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, language_pairs
from ..pairs import PairSuite


@SUITES.register
class Swuggy(PairSuite):
    name = "swuggy"
    title = "sWUGGY: words"
    about = "Of a spoken word and a made-up one, how often the model finds the word more likely. Chance is .5."

    def read(self, folder: Path) -> list[Pair]:
        return language_pairs(folder, "words")
