"""Continues speech from its first second."""

from ...registry import TASKS
from ..task import Material, Prompt, Task


@TASKS.register
class Continue(Task):
    name = "continue"
    title = "Continue"
    meaning = "The model hears the prompt and continues on its own."

    def prompt(self, material: Material) -> Prompt:
        space, codes = material.space, material.row["codes"]
        wanted = round(material.settings.prompt_seconds * material.frame_rate)
        given = max(1, min(wanted, len(codes) // 2))
        ids = [space.bos, space.audio_start, *space.audio_ids(codes[:given]).tolist()]
        budget = (material.longest - given) * space.codebooks + 2
        return Prompt(ids, {space.audio_end}, budget, given=given)
