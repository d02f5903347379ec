"""Where a run starts: at its own newest checkpoint, at one from another run that it branches off, or from scratch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.core.optimizer.optimizer import MegatronOptimizer

from ..config import Recipe
from ..errors import SodaError
from ..vocab import TokenSpace
from . import checkpoint


@dataclass
class Branch:
    """Where a run branched off another one. Empty for most runs."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    consumed: dict[str, int] = field(default_factory=dict)  # samples from each corpus
    origin: str = ""  # the checkpoint
    identity: str = ""  # its identity, wherever it is moved to


@dataclass
class Origin:
    """Where a run starts. fresh: with new weights. resumed: at its own newest checkpoint. branched: at a checkpoint of
    another run, because it has none of its own yet."""

    kind: Literal["fresh", "resumed", "branched"]
    folder: Path | None  # the checkpoint; None for a fresh run
    branch: Branch
    saved: dict[str, Any]  # checkpoint.json
    batch: int  # samples per step
    length: int  # tokens per sample

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.saved["step"]

    def load(self, models: list, optimizer: MegatronOptimizer) -> None:
        """Fills weights and Adam's state, at the ranks' current layout."""
        if self.folder is not None:
            checkpoint.load(self.folder, models, optimizer)

    def first_sample(self, of_step: int) -> int:
        return self.branch.samples + (of_step - self.branch.step) * self.batch

    def tokens(self, at_step: int) -> int:
        """Tokens trained on so far, including those of the run branched off from."""
        return self.branch.tokens + (at_step - self.branch.step) * self.batch * self.length


def find_origin(recipe: Recipe, space: TokenSpace) -> Origin:
    """All ranks call this. Raises SodaError for a checkpoint of a different model, vocabulary or optimizer, or if the
    run did not branch off where the recipe says."""
    run, t, length = Path(recipe.run), recipe.training, recipe.data.sequence_length
    folder = checkpoint.newest_whole(run)
    branching = folder is None and bool(t.branch_from)
    if branching:
        folder = Path(t.branch_from)
        problems = checkpoint.damage(folder)
        if problems:
            raise SodaError(f"training.branch_from={folder}: {problems[0]}")
    saved: dict[str, Any] = {"step": 0, "samples": 0, "branch": {}, "consumed": {}}
    if folder is not None:
        saved = checkpoint.read_description(
            folder, recipe.model, space, checkpoint.describe(recipe, space)["optimizer"]
        )
    branch = Branch(**saved["branch"])
    if branching:
        at = saved["step"], saved["samples"], saved["tokens"], saved["consumed"]
        branch = Branch(*at, t.branch_from, checkpoint.identity(Path(t.branch_from)))
    elif "tokens" not in saved["branch"]:  # an earlier version, in which all windows had the same length
        branch.tokens = branch.samples * length
    if t.branch_from and not _is_origin(t.branch_from, branch):
        raise SodaError(
            f"{run} has checkpoints already, and they did not branch off training.branch_from={t.branch_from} but off "
            f"{branch.origin or 'nothing'}. Give the leg its own `run` folder."
        )
    kind = "branched" if branching else "resumed" if folder else "fresh"
    origin = Origin(kind, folder, branch, saved, t.global_batch_size, length)
    if branching and origin.step >= t.steps:
        raise SodaError(
            f"training.steps={t.steps} is not past step {origin.step}, where the run branches off. Steps count on: for "
            f"1000 more steps set training.steps={origin.step + 1000}"
        )
    return origin


def _is_origin(folder: str, branch: Branch) -> bool:
    """Whether a run branched off this checkpoint, which may since have been renamed, moved or deleted."""
    if not branch.origin:
        return False
    same_place = Path(folder).resolve() == Path(branch.origin).resolve()
    return same_place or (bool(branch.identity) and checkpoint.identity(Path(folder)) == branch.identity)


def branch_state(branch: Branch) -> dict[str, Any]:
    """What checkpoint.json records about it."""
    return asdict(branch) if branch.origin else {}
