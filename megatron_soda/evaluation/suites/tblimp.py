"""tBLIMP: grammatical sentences as text."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, language_pairs
from ..pairs import PairSuite


@SUITES.register
class Tblimp(PairSuite):
    name = "tblimp"
    title = "tBLIMP: grammatical sentences as text"
    about = (
        "Of the transcripts of sBLIMP's pairs, in lower case, how often the model finds the grammatical one more "
        "likely. Chance is .5."
    )
    folder, spoken = "sblimp", False

    def read(self, folder: Path) -> list[Pair]:
        return language_pairs(folder, "sentences")

    def text(self, transcript: str) -> str:
        return transcript.lower()
