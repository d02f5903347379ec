"""The training loop: steps, metrics, checkpoints, resume, branching off another run, and a clean stop on Ctrl-C."""

import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ..config import Recipe, save_recipe
from ..errors import SodaError
from ..files import read_json
from ..model.size import parameter_count, train_flops
from ..parallel import preflight, ranks
from ..parallel.watch import place
from ..run_folder import record_environment, record_timing
from . import checkpoint
from .corpora import Corpora, open_stores
from .metrics import Metrics, check_wandb, memory_gib, mfu, peak_tflops
from .origin import Origin, branch_state, find_origin
from .progress import TrainingProgress
from .schedule import rate_at
from .settings import compare_settings, settings_of, ways_on
from .step import Engine, StepResult, loss_of, nll_vector
from .stop import listening


def train(recipe: Recipe) -> bool:
    """Runs the recipe from its newest whole checkpoint to its last step. False if it was asked to stop before.

    Raises SodaError for a layout or data that do not fit, a checkpoint of another model, vocabulary or optimizer,
    ranks that disagree, a run folder that another process trains in, and a loss that is not finite.
    """
    began = time.monotonic()
    device = ranks.init(recipe)
    with preflight.together(device):
        if ranks.is_first():
            check_wandb(recipe)
    with ranks.locked(Path(recipe.run), device):
        return _train(recipe, device, began)


def _train(recipe: Recipe, device: torch.device, began: float) -> bool:
    run, steps = Path(recipe.run), recipe.training.steps
    rank_map = preflight.check_ranks(recipe, device)
    first = ranks.is_first()

    stores = open_stores(recipe, device)
    description = checkpoint.describe(recipe, stores.space)
    origin = find_origin(recipe, stores.space, description)
    corpora = Corpora(recipe, stores, origin)
    corpora.check_same(recipe, origin)
    notes = [*corpora.notes, *compare_settings(recipe, origin)]
    description |= {"data": corpora.description, "made_by": corpora.made_by, "training": settings_of(recipe)}
    if origin.step >= steps:
        if first:
            ways = ways_on(recipe, origin.branch, origin.saved.get("training") or settings_of(recipe))
            print(f"{run}: all {origin.step} steps are done. {ways}")
        return True

    engine = Engine(recipe, stores.space, device)
    if origin.folder is not None:
        checkpoint.load(origin.folder, engine.models, engine.optimizer.inner)
    saver = checkpoint.Saver(recipe, engine.models, engine.optimizer.inner, description, origin.folder)
    dist.barrier()  # nobody writes into the run folder before everybody has read it
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_tflops(recipe, name)
    if first:
        _record_start(recipe, engine, name, peak)
        if dist.get_world_size() > 1:
            print(rank_map)
        _announce(recipe, engine, corpora, origin)
        for note in notes:
            print(f"note: {note}", flush=True)
    loop = _Loop(recipe, engine, saver, corpora, origin, peak, began)
    step = loop.run()
    if first:
        record_timing(run, "train", {"seconds": time.monotonic() - began}, add=True)
        if step < steps:
            print(f"Stopped at step {step}, saved. The same command goes on from there.")
    return step >= steps


def _record_start(recipe: Recipe, engine: Engine, device: str, peak: float | None) -> None:
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run / "recipe.yaml")
    record_environment(
        run,
        layout=ranks.describe(recipe),
        layers=engine.backend,
        optimizer=engine.optimizer.backend,
        device=device,
        peak_tflops=peak,
        parameters=parameter_count(recipe.model, engine.space),
    )


def _announce(recipe: Recipe, engine: Engine, corpora: Corpora, origin: Origin) -> None:
    parameters = parameter_count(recipe.model, engine.space)
    print(f"{parameters:,} parameters; {ranks.describe(recipe)}; {engine.backend} layers, {engine.optimizer.backend}")
    windows = corpora.windows
    count = sum(corpus.count for corpus in windows.corpora.values())
    here = f"from step {origin.step}" if origin.step else "from the start"
    print(f"{count:,} windows of {windows.length} in {len(windows.corpora)} corpora; {here}", flush=True)


_FIRST_STEPS = 10  # if one of these is not finite, the checkpoint before them is to blame
_MOST_RETURNS = 3


class _Loop:
    """The steps of a run. All ranks do the same; the first one also logs."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        saver: checkpoint.Saver,
        corpora: Corpora,
        origin: Origin,
        peak: float | None,
        began: float,
    ) -> None:
        self.recipe, self.t, self.run_folder = recipe, recipe.training, Path(recipe.run)
        self.engine, self.saver, self.corpora, self.origin = engine, saver, corpora, origin
        self.step = self.started = origin.step
        self.returns: list[int] = []  # checkpoints that were given up, since the steps after them were not finite
        with preflight.together(engine.device):
            self.metrics = Metrics(recipe, self.step) if ranks.is_first() else None
        self.began, self.peak = began, peak
        self.names = engine.space.class_names
        self.tokens_per_step = self.t.global_batch_size * corpora.windows.length
        self.flops = train_flops(recipe.model, engine.space, corpora.windows.length)
        self.validated = -1, torch.zeros(2, 1)  # after which step, and the loss sums
        self.skipped: int = origin.saved.get("skipped_steps", 0)
        self.settings = settings_of(recipe)
        self.mark, self.marked = time.monotonic(), self.step
        self.flag = torch.zeros(1, device=engine.device)
        self.progress = TrainingProgress(self.step, self.t.steps, self.metrics is not None)

    def run(self) -> int:
        """Returns the step that was reached and saved: the last one, unless it was asked to stop."""
        try:
            with listening() as stop, self.progress:
                stop.phase = "stepping"
                place.move("between")
                while self.step < self.t.steps:
                    if not self._train_step():
                        continue
                    stopping = self._any_rank(stop.asked)
                    if self._due(self.t.log_every) or self._due(self.t.save_every) or stopping:
                        self._check_stores()
                    if self._due(self.t.valid_every):
                        self._validate()
                    with self.engine.seconds.of("save"):
                        self.saver.poll()
                        if self._due(self.t.save_every) or stopping:
                            self._save()
                    if stopping:
                        break
                place.move("ending")
                self.saver.finish()
                stop.phase = "over"
        finally:
            if self.metrics:
                self.metrics.close()
        return self.step

    def _any_rank(self, wish: bool) -> bool:
        self.flag.fill_(float(wish))
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        return bool(self.flag.item())

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.t.steps

    def _train_step(self) -> bool:
        """False if it went back to an earlier checkpoint."""
        rate = self._rate(self.step)
        result = self.engine.train_step(self.corpora.windows, self.origin.first_sample(self.step), rate)
        self.step += 1
        place.step = self.step
        self.skipped += result.skipped
        if not (result.skipped or (math.isfinite(result.loss or 0.0) and math.isfinite(result.grad_norm))):
            self._blown_up(f"loss {result.loss}, gradient norm {result.grad_norm}")
            return False
        if self.metrics and (self._due(self.t.log_every) or self.step == 1):
            self._log(self.metrics, result, rate)
        self.progress.advance(self.step)
        return True

    def _check_stores(self) -> None:
        problem = self.corpora.overwritten()
        try:
            preflight.share_problem(problem, self.engine.device)
        except SodaError as error:
            self.saver.finish()
            raise SodaError(
                f"step {self.step}: {error} Put the store back as it was and run again: it goes on from the last "
                "checkpoint."
            ) from None

    def _rate(self, step: int) -> float:
        return rate_at(step, self.settings, self.origin.branch.step)

    def _log(self, metrics: Metrics, result: StepResult, rate: float) -> None:
        now, steps, parts = time.monotonic(), self.step - self.marked, self.engine.seconds.take()
        training = now - self.mark - parts.get("validate", 0.0) - parts.get("save", 0.0)
        speed = steps * self.tokens_per_step / training
        metrics.write(
            self.step,
            {
                "tokens": self.origin.tokens(self.step),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
                "mfu": mfu(self.flops, speed, dist.get_world_size(), self.peak),
                "memory_gib": memory_gib(),
                "seconds": now - self.began,
                "step_seconds": {part: s / steps for part, s in parts.items()},
                "nll": nll_vector(result.sums, self.names),
                **({"skipped_steps": self.skipped} if self.skipped else {}),
            },
        )
        self.mark, self.marked = now, self.step
        self.progress.log(self.step, result.loss, speed)

    def _blown_up(self, what: str) -> None:
        """Goes back to the checkpoint before the one that training began from, if that one may be to blame; else a
        SodaError. The loop goes on from `self.step`."""
        self.saver.finish()  # what is being written is from before, and finite
        told = f"step {self.step}: {what}."
        at_start = self.origin.folder is not None and self.step - self.started <= _FIRST_STEPS
        if at_start and not self.origin.branching and len(self.returns) < _MOST_RETURNS:
            with place.of("starting"):
                before = checkpoint.newest_whole(self.run_folder, before=self.started)
                if before is not None:
                    self._go_back(before, told)
                    return
        lower = f"a lower training.learning_rate (now {self.t.learning_rate:g})"
        if not at_start:
            saved = checkpoint.saved_steps(self.run_folder)
            on = (
                f"it goes on from the checkpoint of step {saved[-1]}"
                if saved
                else "nothing was saved, so it starts anew"
            )
            raise SodaError(f"{told} Run again with {lower}: {on}.")
        if self.origin.branching:
            raise SodaError(f"{told} Branch off an earlier checkpoint than {self.origin.folder}, or with {lower}.")
        tried = ", ".join(map(str, sorted([*self.returns, self.started])))
        raise SodaError(
            f"{told} So it went after each checkpoint that was tried ({tried}). Run again with {lower}; if that does "
            "not help, start from the beginning in another run folder."
        )

    def _go_back(self, folder: Path, told: str) -> None:
        saved = read_json(folder / "checkpoint.json")
        if self.metrics:
            print(
                f"warning: {told} The checkpoint of step {self.started}, from which training went on, may be to blame: "
                f"going back to that of step {saved['step']}.",
                flush=True,
            )
            self.metrics.close()
            self.metrics = Metrics(self.recipe, saved["step"])
        checkpoint.load(folder, self.engine.models, self.engine.optimizer.inner)
        self.saver.origin = folder.resolve()
        self.returns.append(self.started)
        self.step = self.started = self.marked = saved["step"]
        self.skipped, self.mark = saved.get("skipped_steps", 0), time.monotonic()
        self.engine.seconds.take()

    def _set_aside(self) -> None:
        """Renames the checkpoints that were given up: the one before them was good, and nobody should use them."""
        for step in self.returns:
            folder = checkpoint.folder_of(self.run_folder, step)
            if ranks.is_first() and folder.is_dir():
                aside = folder.with_name(f"not_finite_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                print(f"{folder} was set aside as {aside.name}.", flush=True)
        self.returns = []

    def _validate(self) -> None:
        with self.engine.seconds.of("validate"):
            sums = self.engine.validate(self.corpora.valid, self.corpora.valid_count)
        self.validated = self.step, sums
        if self.metrics:
            self.metrics.write(self.step, {"valid_loss": loss_of(sums), "valid_nll": nll_vector(sums, self.names)})

    def _save(self) -> None:
        """Saves nothing that has blown up: weights can be finite, and too large for a finite loss."""
        at, sums = self.validated
        if at != self.step:
            sums = self.engine.validate(self.corpora.valid, 1)
        if not (self.engine.is_finite() and bool(torch.isfinite(sums).all())):
            self._blown_up(f"parameters or the validation loss ({loss_of(sums)}) are not finite; this is not saved")
            return
        self._set_aside()
        samples, windows = self.origin.first_sample(self.step), self.corpora.windows
        self.saver.start(
            self.step,
            {
                "samples": samples,
                "branch": branch_state(self.origin.branch),
                "tokens": self.origin.tokens(self.step),
                "consumed": windows.consumed(samples),
                "skipped_steps": self.skipped,
            },
        )


def exit_quietly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
