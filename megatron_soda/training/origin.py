"""What a run begins with: its own newest checkpoint, one of another run that it branches off, the weights of a
checkpoint, or nothing."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.core.optimizer.optimizer import MegatronOptimizer

from ..config import Recipe
from ..errors import SodaError
from ..files import read_json
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
    """Where a run begins. fresh: with new weights. resumed: at its own newest checkpoint. branched: at a checkpoint of
    another run, as it has none of its own yet. weights only: at step 0, with the weights of a checkpoint."""

    kind: Literal["fresh", "resumed", "branched", "weights only"]
    folder: Path | None  # the checkpoint; None of a fresh run
    branch: Branch
    saved: dict[str, Any]  # checkpoint.json
    batch: int  # samples per step
    length: int  # tokens per sample

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.saved["step"]

    def load(self, models: list, optimizer: MegatronOptimizer) -> None:
        """Fills weights and Adam's state, at whatever layout the ranks now have."""
        if self.kind == "weights only" and self.folder is not None:
            checkpoint.load(self.folder, models, None)
            optimizer.reload_model_params()  # its own float32 copies, of a bf16 model
        elif self.folder is not None:
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
    folder, kind = _find(recipe)
    branching = kind == "branched"
    saved: dict[str, Any] = {"step": 0, "samples": 0, "branch": {}, "consumed": {}}
    if kind == "weights only" and folder is not None:
        of_weights = checkpoint.read_description(folder, recipe.model, space)
        saved["made_by"] = of_weights.get("made_by", {})
        saved["init"] = {
            "origin": str(folder),
            "identity": checkpoint.identity(folder),
            "name": of_weights.get("imported", {}).get("name", ""),
        }
    elif folder is not None:
        saved = checkpoint.read_description(
            folder, recipe.model, space, checkpoint.describe(recipe, space)["optimizer"]
        )
    branch = Branch(**saved["branch"])
    if branching:
        at = saved["step"], saved["samples"], saved["tokens"], saved["consumed"]
        branch = Branch(*at, t.branch_from, checkpoint.identity(Path(t.branch_from)))
    elif "tokens" not in saved["branch"]:  # an earlier version, in which all windows had the same length
        branch.tokens = branch.samples * length
    if t.branch_from and not _is_origin(t.branch_from, branch.origin, branch.identity):
        raise SodaError(
            f"{run} has checkpoints already, and they did not branch off training.branch_from={t.branch_from} but off "
            f"{branch.origin or 'nothing'}. Give the leg its own `run` folder."
        )
    init = saved.get("init") or {"origin": "", "identity": ""}
    if t.init_from and not _is_origin(t.init_from, init["origin"], init["identity"]):
        others = f"those of {init['origin']}" if init["origin"] else "new ones"
        raise SodaError(
            f"{run} has checkpoints already, and they did not start with the weights of "
            f"training.init_from={t.init_from} but with {others}. Use another `run` folder."
        )
    origin = Origin(kind, folder, branch, saved, t.global_batch_size, length)
    if branching and origin.step >= t.steps:
        raise SodaError(
            f"training.steps={t.steps} is not past step {origin.step}, where the run branches off. Steps count on: for "
            f"1000 more steps set training.steps={origin.step + 1000}"
        )
    return origin


def _find(recipe: Recipe) -> tuple[Path | None, Literal["fresh", "resumed", "branched", "weights only"]]:
    """The checkpoint that a run begins with, and how."""
    run, t = Path(recipe.run), recipe.training
    if own := checkpoint.newest_whole(run):  # the only one may be of an imported model
        return own, "weights only" if _holds_weights_only(own) else "resumed"
    if t.init_from:
        return _given("init_from", t.init_from), "weights only"
    if not t.branch_from:
        return None, "fresh"
    folder = _given("branch_from", t.branch_from)
    if _holds_weights_only(folder):
        raise SodaError(
            f"training.branch_from={folder}: holds weights alone, without a state of the optimizer. Start with them: "
            f"training.init_from={folder}"
        )
    return folder, "branched"


def _given(key: str, name: str) -> Path:
    """SodaError unless the folder is a whole checkpoint."""
    folder = Path(name)
    if not (folder / "checkpoint.json").is_file():
        steps = checkpoint.saved_steps(folder)
        hint = f" It is a run; name a checkpoint of it: {checkpoint.folder_of(folder, steps[-1])}" if steps else ""
        if (folder / "config.json").is_file():
            hint = f" It is a Hugging Face model; make a checkpoint of it: soda import {folder} run=RUN"
        raise SodaError(f"training.{key}={folder}: not a checkpoint (RUN/checkpoints/step_..).{hint}")
    problems = checkpoint.damage(folder)
    if problems:
        raise SodaError(f"training.{key}={folder}: {problems[0]}")
    return folder


def _holds_weights_only(folder: Path) -> bool:
    return bool(read_json(folder / "checkpoint.json", dict).get("weights_only"))


def _is_origin(folder: str, origin: str, identity: str) -> bool:
    """Whether a run began with this checkpoint: it may be named otherwise, or have moved, or be gone since."""
    if not origin:
        return False
    same_place = Path(folder).resolve() == Path(origin).resolve()
    return same_place or (bool(identity) and checkpoint.identity(Path(folder)) == identity)


def branch_state(branch: Branch) -> dict[str, Any]:
    """What checkpoint.json records about it."""
    return asdict(branch) if branch.origin else {}
