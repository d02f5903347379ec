"""The training loop: steps, metrics, checkpoints, resume, branching off another run, and a clean stop on Ctrl-C."""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import Recipe, save_recipe
from ..errors import SodaError
from ..model.size import parameter_count, train_flops
from ..parallel import preflight, ranks
from ..parallel.watch import place
from ..run_folder import record_environment, record_timing
from . import checkpoint
from .corpora import Corpora, first_store
from .metrics import Metrics, check_wandb, memory_gib, mfu, peak_tflops
from .origin import Origin, branch_state, find_origin
from .schedule import learning_rate
from .step import Engine, StepResult, loss_of, nll_vector
from .stop import listening


def train(recipe: Recipe) -> bool:
    """Runs the recipe from its newest whole checkpoint to its last step. False if it was asked to stop before.

    Raises SodaError for a layout or data that do not fit, a checkpoint of another model, vocabulary or optimizer,
    ranks that disagree, a run folder that another process trains in, and a loss that is not finite.
    """
    began = time.monotonic()
    check_wandb(recipe)
    device = ranks.init(recipe)
    with ranks.locked(Path(recipe.run), device):
        return _train(recipe, device, began)


def _train(recipe: Recipe, device: torch.device, began: float) -> bool:
    run, steps = Path(recipe.run), recipe.training.steps
    rank_map = preflight.check_ranks(recipe, device)
    first = ranks.is_first()

    space = first_store(recipe).space
    description = checkpoint.describe(recipe, space)
    origin = find_origin(recipe, space, description)
    corpora = Corpora(recipe, origin)
    corpora.check_same(recipe, origin)
    description["data"] = corpora.description
    if origin.step >= steps:
        if first:
            print(f"{run}: all {origin.step} steps are done. To train longer, raise training.steps.")
        return True

    engine = Engine(recipe, space, device)
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
        self.t, self.engine, self.saver, self.corpora, self.origin = recipe.training, engine, saver, corpora, origin
        self.step = origin.step
        self.metrics = Metrics(recipe, self.step) if ranks.is_first() else None
        self.began, self.peak = began, peak
        self.names = engine.space.class_names
        self.tokens_per_step = self.t.global_batch_size * corpora.windows.length
        self.flops = train_flops(recipe.model, engine.space, corpora.windows.length)
        self.mark, self.marked = time.monotonic(), self.step
        self.flag = torch.zeros(1, device=engine.device)
        columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
        self.progress = Progress(*columns, TimeRemainingColumn(), disable=self.metrics is None)
        self.bar = self.progress.add_task("train", total=self.t.steps, completed=self.step, note="")

    def run(self) -> int:
        """Returns the step that was reached and saved: the last one, unless it was asked to stop."""
        try:
            with listening() as stop, self.progress:
                stop.phase = "stepping"
                place.move("between")
                while self.step < self.t.steps:
                    self._train_step()
                    stopping = self._any_rank(stop.asked)
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

    def _train_step(self) -> None:
        rate = self._rate(self.step)
        result = self.engine.train_step(self.corpora.windows, self.origin.first_sample(self.step), rate)
        self.step += 1
        place.step = self.step
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self.saver.finish()  # what is being written is from before, and whole
            raise SodaError(
                f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}. Lower "
                f"training.learning_rate (now {self.t.learning_rate:g}) and run again: it goes on from the last "
                "checkpoint."
            )
        if self.metrics and (self._due(self.t.log_every) or self.step == 1):
            self._log(self.metrics, result, rate)
        self.progress.update(self.bar, completed=self.step)

    def _rate(self, step: int) -> float:
        t = self.t
        return learning_rate(
            step,
            schedule=t.schedule,
            steps=t.steps,
            peak=t.learning_rate,
            warmup_share=t.warmup_share,
            decay_share=t.decay_share,
            branched_at=self.origin.branch.step,
        )

    def _log(self, metrics: Metrics, result: StepResult, rate: float) -> None:
        now, steps = time.monotonic(), self.step - self.marked
        speed = steps * self.tokens_per_step / (now - self.mark)
        metrics.write(
            self.step,
            {
                "tokens": self.origin.first_sample(self.step) * self.corpora.windows.length,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
                "mfu": mfu(self.flops, speed, dist.get_world_size(), self.peak),
                "memory_gib": memory_gib(),
                "seconds": now - self.began,
                "step_seconds": {part: s / steps for part, s in self.engine.seconds.take().items()},
                "nll": nll_vector(result.sums, self.names),
            },
        )
        self.mark, self.marked = now, self.step
        self.progress.update(self.bar, note=f"loss {result.loss:.3f}  {speed:,.0f} tokens/s")

    def _validate(self) -> None:
        with self.engine.seconds.of("validate"):
            sums = self.engine.validate(self.corpora.valid, self.t.valid_windows)
        if self.metrics:
            self.metrics.write(self.step, {"valid_loss": loss_of(sums), "valid_nll": nll_vector(sums, self.names)})

    def _save(self) -> None:
        samples, windows = self.origin.first_sample(self.step), self.corpora.windows
        self.saver.start(
            self.step,
            {
                "samples": samples,
                "branch": branch_state(self.origin.branch),
                "tokens": samples * windows.length,
                "consumed": windows.consumed(samples),
            },
        )


def exit_quietly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
