"""sStoryCloze: how stories end."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, story_pairs
from ..pairs import PairSuite


@SUITES.register
class SpokenStoryCloze(PairSuite):
    name = "sstorycloze"
    title = "sStoryCloze: how stories end"
    about = "Of two endings of a spoken story, how often the model finds the true one more likely. Chance is .5."

    def read(self, folder: Path) -> list[Pair]:
        return story_pairs(folder)
