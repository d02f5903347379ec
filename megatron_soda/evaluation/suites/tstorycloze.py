"""tStoryCloze: endings on the topic."""

from pathlib import Path

from ...registry import SUITES
from ..pair_files import Pair, story_pairs
from ..pairs import PairSuite


@SUITES.register
class TopicStoryCloze(PairSuite):
    name = "tstorycloze"
    title = "tStoryCloze: endings on the topic"
    about = (
        "Of a spoken story's ending and another story's, how often the model finds the true one more likely. "
        "Chance is .5."
    )

    def read(self, folder: Path) -> list[Pair]:
        return story_pairs(folder)
