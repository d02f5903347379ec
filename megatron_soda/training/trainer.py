"""A run: where it starts, its steps, and how it ends. All ranks do the same; the first one also logs."""

import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import Recipe, save_recipe
from ..errors import SodaError
from ..files import read_json
from ..log import log
from ..model.size import parameter_count, train_flops
from ..parallel import preflight, ranks
from ..parallel.watch import place
from ..run_folder import record_environment, record_timing
from . import checkpoint
from .corpora import Corpora, open_stores
from .evaluations import Evaluation, check_suites, owed
from .metrics import Metrics, check_wandb, memory_gib, mfu, peak_tflops
from .origin import Origin, branch_state, find_origin
from .progress import TrainingProgress
from .schedule import rate_at
from .settings import compare_settings, settings_of, ways_on
from .step import Engine, StepResult, loss_of, nll_vector
from .stop import Stop, listening


def train(recipe: Recipe) -> bool:
    """Runs the recipe from its newest intact checkpoint to its last step. Returns False if it was asked to stop
    earlier.

    Raises SodaError for an unsuitable layout, data or suite, a checkpoint of a different model, vocabulary or
    optimizer, ranks that disagree, a run folder in use by another process, and a loss that is not finite.
    """
    began = time.monotonic()
    device = ranks.init(recipe)
    with preflight.together(device):
        if ranks.is_first():
            check_wandb(recipe)
    with ranks.locked(Path(recipe.run), device):
        rank_map = preflight.check_groups(ranks.facts, device)
        stores = open_stores(recipe, device)
        origin = find_origin(recipe, stores.space)
        corpora = Corpora(recipe, stores, origin)
        notes = [*corpora.notes, *compare_settings(recipe, origin)]
        if origin.step >= recipe.training.steps and not owed(recipe, origin.step, device):
            _say_done(recipe, origin)
            return True
        check_suites(recipe, device)
        trainer = Trainer(recipe, corpora, origin, device, began)
        trainer.announce([rank_map] if dist.get_world_size() > 1 else [], notes)
        return trainer.run()


def _say_done(recipe: Recipe, origin: Origin) -> None:
    if ranks.is_first():
        ways = ways_on(recipe, origin.branch, origin.saved.get("training") or settings_of(recipe))
        log.info(f"{recipe.run}: all {origin.step} steps are done. {ways}")


_FIRST_STEPS = 10  # if one of these is not finite, the checkpoint before them is to blame
_MOST_RETURNS = 3
_SIGNAL = 5.0  # seconds in which a signal to all processes of a job reaches each


class Trainer:
    """Takes the steps from `origin` on. `corpora` provides the training samples and the validation data."""

    def __init__(self, recipe: Recipe, corpora: Corpora, origin: Origin, device: torch.device, began: float) -> None:
        self.recipe, self.t, self.run_folder, self.began = recipe, recipe.training, Path(recipe.run), began
        self.corpora, self.source, self.origin = corpora, corpora.source, origin
        self.step = self.started = origin.step
        self.settings = settings_of(recipe)
        self.engine = Engine(recipe, corpora.space, device, corpora.stores.slots)
        models, optimizer = self.engine.models, self.engine.optimizer.inner
        origin.load(models, optimizer)
        self.saver = checkpoint.Saver(recipe, models, optimizer, self._description(), origin.folder)
        dist.barrier()  # no rank may write to the run folder before all have read it
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = peak_tflops(recipe, self.device_name)
        with preflight.together(device):
            self.metrics = Metrics(recipe, self.step) if ranks.is_first() else None
        self.skipped: int = origin.saved.get("skipped_steps", 0)
        self.validated = -1, torch.zeros(2, 1)  # after which step, and the loss sums
        self.saved = origin.step if origin.kind == "resumed" else -1  # the step of the newest checkpoint
        self.returns: list[int] = []  # checkpoints given up because the steps after them were not finite
        self.mark, self.marked = time.monotonic(), self.step  # when metrics were last written, and at which step
        self.progress = TrainingProgress(self.step, self.t.steps, self.metrics is not None)

    def _description(self) -> dict[str, Any]:
        """What every checkpoint of this run records about itself."""
        model = checkpoint.describe(self.recipe, self.corpora.space)
        return {**model, "data": self.corpora.description, "made_by": self.corpora.made_by, "training": self.settings}

    def _flops(self) -> int:
        """Of a token."""
        return train_flops(self.recipe.model, self.engine.space, self.source.length, self.engine.head_rows)

    def announce(self, lines: list[str], notes: list[str]) -> None:
        """Records and logs what this run is, including `lines` and `notes`."""
        if self.metrics is None:
            return
        recipe, engine = self.recipe, self.engine
        parameters, layout = parameter_count(recipe.model, engine.space), ranks.layout_line(recipe)
        save_recipe(recipe, self.run_folder / "recipe.yaml")
        record_environment(
            self.run_folder,
            layout=layout,
            layers=engine.backend,
            optimizer=engine.optimizer.backend,
            speed=asdict(engine.speed),
            device=self.device_name,
            peak_tflops=self.peak,
            parameters=parameters,
        )
        here = f"from step {self.step}" if self.step else "from the start"
        if self.origin.kind == "weights only":
            here = f"from the weights of {self.origin.folder}"
        for line in lines:
            log.info(line)
        log.info(f"{parameters:,} parameters; {layout}; {engine.backend} layers, {engine.optimizer.backend}")
        log.info(f"for speed: {engine.speed.line()}")
        log.info(f"{self.source}; {here}")
        for note in notes:
            log.info(f"note: {note}")

    def run(self) -> bool:
        """Returns whether all was done; if not, it was asked to stop, and has saved."""
        try:
            with listening() as stop, self.progress:
                stop.phase = "stepping"
                place.move("between")
                stopping = self.evaluate(stop)  # if it was stopped here
                while self.step < self.t.steps and not stopping:
                    result = self.train_step()
                    if not self.guard(result):
                        continue
                    self.log(result)
                    stopping = self.any_rank(stop.asked)
                    self.check_stores(stopping)
                    self.validate()
                    self.save(stopping)
                    stopping = stopping or self.evaluate(stop)
                place.move("ending")
                self.saver.finish()
                stop.phase = "over"
        finally:
            if self.metrics:
                self.metrics.close()
        return self.end(stopping and owed(self.recipe, self.step, self.engine.device))

    def train_step(self) -> StepResult:
        """One optimizer step; `self.step` counts finished ones."""
        first_sample = self.origin.first_sample(self.step)
        result = self.engine.train_step(self.source, first_sample, self.rate(self.step))
        self.step += 1
        place.step = self.step
        self.skipped += result.skipped
        return result

    def guard(self, result: StepResult) -> bool:
        """Whether the step was finite. If not, goes back to an earlier checkpoint or raises SodaError."""
        if result.skipped or (math.isfinite(result.loss or 0.0) and math.isfinite(result.grad_norm)):
            self.progress.advance(self.step)
            return True
        self._blown_up(f"loss {result.loss}, gradient norm {result.grad_norm}")
        return False

    def log(self, result: StepResult) -> None:
        """Writes the metrics of a step, every `logging.log_every` steps."""
        if self.metrics is None or not (self._due(self.recipe.logging.log_every) or self.step == 1):
            return
        now, steps, parts = time.monotonic(), self.step - self.marked, self.engine.seconds.take()
        training = now - self.mark - sum(parts.get(part, 0.0) for part in ("validate", "save", "evaluate"))
        speed = steps * self.t.global_batch_size * self.source.length / training
        self.metrics.write(
            self.step,
            {
                "tokens": self.origin.tokens(self.step),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": self.rate(self.step - 1),
                "tokens_per_second": speed,
                "mfu": mfu(self._flops(), speed, dist.get_world_size(), self.peak),
                "memory_gib": memory_gib(),
                "seconds": now - self.began,
                "step_seconds": {part: s / steps for part, s in parts.items()},
                "nll": nll_vector(result.sums, self.engine.space.class_names),
                **({"skipped_steps": self.skipped} if self.skipped else {}),
            },
        )
        self.mark, self.marked = now, self.step
        self.progress.log(self.step, result.loss, speed)

    def any_rank(self, asked: bool) -> bool:
        """Whether any rank was asked to stop; all ranks find out at the same step."""
        return preflight.any_rank(asked, self.engine.device)

    def check_stores(self, stopping: bool) -> None:
        """Raises SodaError on all ranks if a store was overwritten during the run, before anything is logged or
        saved."""
        if not (self._due(self.recipe.logging.log_every) or self._due(self.recipe.checkpoint.save_every) or stopping):
            return
        try:
            preflight.share_problem(self.corpora.overwritten(), self.engine.device)
        except SodaError as error:
            self.saver.finish()
            raise SodaError(
                f"step {self.step}: {error} Restore the store and run again: training resumes from the last checkpoint."
            ) from None

    def validate(self) -> None:
        """The loss on held-out windows, every `training.valid_every` steps."""
        if not self._due(self.t.valid_every):
            return
        with self.engine.seconds.of("validate"):
            sums = self.engine.validate(self.corpora.valid, self.corpora.valid_count)
        self.validated = self.step, sums
        if self.metrics:
            names = self.engine.space.class_names
            self.metrics.write(self.step, {"valid_loss": loss_of(sums), "valid_nll": nll_vector(sums, names)})

    def save(self, stopping: bool) -> None:
        """Continues a checkpoint in progress, and starts one every `checkpoint.save_every` steps and before a stop."""
        with self.engine.seconds.of("save"):
            self.saver.poll()
            if self._due(self.recipe.checkpoint.save_every) or stopping:
                self._save()

    def evaluate(self, stop: Stop) -> bool:
        """Measures the checkpoint of this step with suites, every `evaluate.every` steps, unless it has been measured.
        All ranks wait; returns whether one was asked to stop meanwhile."""
        if self.saved != self.step or not owed(self.recipe, self.step, self.engine.device):
            return False
        with self.engine.seconds.of("save"):
            self.saver.finish()
        with (
            self.engine.seconds.of("evaluate"),
            Evaluation(self.recipe, self.step, starts=self.metrics is not None) as evaluation,
        ):
            while not (stopping := self.any_rank(stop.asked)) and not self.any_rank(evaluation.done()):
                place.move("evaluate")
            if not stopping and evaluation.was_signalled():
                stop.wait(_SIGNAL)  # whoever stops the whole job signals this process, too
            stopping = stopping or self.any_rank(stop.asked)
        if self.metrics and stopping:
            log.info(f"step {self.step} was not evaluated to the end")
        elif self.metrics:  # empty if it failed, so that it is not tried again at every start
            self.metrics.write(self.step, {"evaluation": evaluation.figures()})
        return stopping

    def end(self, stopped: bool) -> bool:
        """stopped: before the last step, or before its evaluation."""
        if self.metrics:
            record_timing(self.run_folder, "train", {"seconds": time.monotonic() - self.began}, add=True)
            if stopped or self.step < self.t.steps:
                log.info(f"Stopped at step {self.step} and saved. The same command resumes from there.")
        return self.step >= self.t.steps and not stopped

    def rate(self, step: int) -> float:
        return rate_at(step, self.settings, self.origin.branch.step)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.t.steps

    def _save(self) -> None:
        """Refuses to save a diverged state: weights can be finite, yet too large for a finite loss."""
        at, sums = self.validated
        if at != self.step:
            sums = self.engine.validate(self.corpora.valid, 1)
        if not (self.engine.is_finite() and bool(torch.isfinite(sums).all())):
            self._blown_up(f"parameters or the validation loss ({loss_of(sums)}) are not finite, so this is not saved")
            return
        self._set_aside()
        self.saved = self.step
        samples = self.origin.first_sample(self.step)
        self.saver.start(
            self.step,
            {
                "samples": samples,
                "branch": branch_state(self.origin.branch),
                "init": self.origin.saved.get("init", {}),
                "tokens": self.origin.tokens(self.step),
                "consumed": self.source.consumed(samples),
                "skipped_steps": self.skipped,
            },
        )

    def _blown_up(self, what: str) -> None:
        """Goes back to the checkpoint before the one that training started from, if that one may be to blame; otherwise
        raises SodaError. The loop continues from `self.step`."""
        self.saver.finish()  # what is being written is from before, and finite
        told = f"step {self.step}: {what}."
        at_start = self.origin.kind in ("resumed", "branched") and self.step - self.started <= _FIRST_STEPS
        if at_start and self.origin.kind == "resumed" and len(self.returns) < _MOST_RETURNS:
            with place.of("starting"):
                before = checkpoint.newest_whole(self.run_folder, before=self.started)
                if before is not None:
                    self._go_back(before, told)
                    return
        lower = f"a lower optimizer.learning_rate (now {self.recipe.optimizer.learning_rate:g})"
        if not at_start:
            saved = checkpoint.saved_steps(self.run_folder)
            on = (
                f"it resumes from the checkpoint of step {saved[-1]}"
                if saved
                else "nothing was saved, so it starts from the beginning"
            )
            raise SodaError(f"{told} Run again with {lower}: {on}.")
        if self.origin.kind == "branched":
            raise SodaError(f"{told} Branch off an earlier checkpoint than {self.origin.folder}, or with {lower}.")
        tried = ", ".join(map(str, sorted([*self.returns, self.started])))
        raise SodaError(
            f"{told} It happened after each checkpoint that was tried ({tried}). Run again with {lower}; if that does "
            "not help, start from the beginning in another run folder."
        )

    def _go_back(self, folder: Path, told: str) -> None:
        saved = read_json(folder / "checkpoint.json")
        if self.metrics:
            log.warning(
                f"{told} The checkpoint of step {self.started}, from which training resumed, may be to blame: going "
                f"back to that of step {saved['step']}."
            )
            self.metrics.close()
            self.metrics = Metrics(self.recipe, saved["step"])
        checkpoint.load(folder, self.engine.models, self.engine.optimizer.inner)
        self.saver.origin = folder.resolve()
        self.returns.append(self.started)
        self.step = self.started = self.marked = self.saved = saved["step"]
        self.skipped, self.mark = saved.get("skipped_steps", 0), time.monotonic()
        self.engine.seconds.take()

    def _set_aside(self) -> None:
        """Renames the checkpoints that were given up, so that nobody uses them: the one before them was good."""
        for step in self.returns:
            folder = checkpoint.folder_of(self.run_folder, step)
            if ranks.is_first() and folder.is_dir():
                aside = folder.with_name(f"not_finite_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                log.warning(f"{folder} was set aside as {aside.name}.")
        self.returns = []


def exit_quietly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
