"""tWUGGY: words as text."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, language_pairs
from ..pairs import PairSuite


@SUITES.register
class Twuggy(PairSuite):
    name = "twuggy"
    title = "tWUGGY: words as text"
    about = "Of the spellings of sWUGGY's pairs, how often the model finds that of the word more likely. Chance is .5."
    folder, spoken = "swuggy", False

    def read(self, folder: Path) -> list[Pair]:
        return language_pairs(folder, "words")
