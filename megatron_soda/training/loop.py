"""The training loop: steps, metrics, checkpoints, resume, and a clean stop on Ctrl-C."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import Recipe, save_recipe
from ..data.store import Store
from ..data.windows import Windows
from ..errors import SodaError
from ..files import write_text
from ..model.size import parameter_count
from ..parallel import ranks
from ..run_folder import record_environment, record_timing
from . import checkpoint
from .optimizer import set_learning_rate
from .schedule import learning_rate
from .step import Engine, loss_of, nll_vector


class Metrics:
    """RUN/metrics.jsonl and TensorBoard, on the first rank. On resume, lines of later steps are dropped."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / "metrics.jsonl"
        kept = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the last line of a run that was killed
        write_text(self.path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for key, value in values.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                self.board.add_scalar(f"{key}/{name}" if name else key, number, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that all ranks learn of together, between two steps."""

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros(1, device=device)
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def agreed(self) -> bool:
        self.flag.fill_(float(self.asked))
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        return bool(self.flag.item())

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def train(recipe: Recipe) -> bool:
    """Runs the recipe from its newest checkpoint to its last step. False if it was asked to stop before.

    Raises SodaError for a layout or data that do not fit, a checkpoint of another model, and a loss that is not finite.
    """
    began = time.time()
    run = Path(recipe.run)
    device = ranks.init(recipe)
    store = Store(recipe.data_folder / "train")
    windows = Windows(store, recipe.data.sequence_length, recipe.seed)
    valid = Windows(Store(recipe.data_folder / "valid"), recipe.data.sequence_length, recipe.seed)
    valid.store.check_space(store.space, str(store.path))
    t = recipe.training
    engine = Engine(recipe, store.space, device)
    description = checkpoint.describe(recipe.model, store.space)
    newest = checkpoint.latest(run)
    step = 0
    if newest is not None:
        step = checkpoint.check_same_model(newest, recipe.model, store.space)["step"]
        if step < t.steps:
            checkpoint.load(newest, engine.model, engine.optimizer)
    first = ranks.is_first()
    if step >= t.steps:
        if first:
            print(f"{run}: all {step} steps are done. To train longer, raise training.steps.")
        return True
    dist.barrier()  # nobody writes into the run folder before everybody has read it
    metrics = None
    if first:
        run.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run / "recipe.yaml")
        parameters = parameter_count(recipe.model, store.space)
        record_environment(
            run, layout=ranks.describe(recipe), layers=engine.backend, device=str(device), parameters=parameters
        )
        metrics = Metrics(run, step)
        here = f"from step {step}" if step else "from the start"
        layout = ranks.describe(recipe)
        print(f"{parameters:,} parameters, {windows.count:,} windows of {windows.length}; {layout}; {here}")

    stop = StopRequest(device)
    columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    progress = Progress(*columns, TimeRemainingColumn(), disable=not first)
    names = store.space.class_names
    tokens_per_step = t.global_batch_size * windows.length
    mark, marked = time.time(), step
    try:
        with progress:
            bar = progress.add_task("train", total=t.steps, completed=step, note="")
            while step < t.steps:
                rate = learning_rate(
                    step, steps=t.steps, peak=t.learning_rate, warmup_share=t.warmup_share, decay_share=t.decay_share
                )
                set_learning_rate(engine.optimizer, rate)
                result = engine.train_step(windows, step)
                step += 1
                if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                    raise SodaError(
                        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}. Lower "
                        f"training.learning_rate (now {t.learning_rate:g}) and run again: it goes on from the last "
                        "checkpoint."
                    )
                if metrics and (step % t.log_every == 0 or step == t.steps or step == 1):
                    now = time.time()
                    speed = (step - marked) * tokens_per_step / (now - mark)
                    mark, marked = now, step
                    metrics.write(
                        step,
                        {
                            "tokens": step * tokens_per_step,
                            "loss": result.loss,
                            "grad_norm": result.grad_norm,
                            "learning_rate": rate,
                            "tokens_per_second": speed,
                            "seconds": now - began,
                            "nll": nll_vector(result.sums, names),
                        },
                    )
                    note = f"loss {result.loss:.3f}  {speed:,.0f} tokens/s"
                else:
                    note = progress.tasks[bar].fields["note"]
                progress.update(bar, completed=step, note=note)
                stopping = stop.agreed()
                if step % t.valid_every == 0 or step == t.steps:
                    sums = engine.validate(valid, t.valid_windows)
                    if metrics:
                        metrics.write(step, {"valid_loss": loss_of(sums), "valid_nll": nll_vector(sums, names)})
                if step % t.save_every == 0 or step == t.steps or stopping:
                    checkpoint.save(
                        run, step, engine.model, engine.optimizer, description, {"tokens": step * tokens_per_step}
                    )
                if stopping:
                    break
    finally:
        stop.restore()
        if metrics:
            metrics.close()
    if first:
        record_timing(run, "train", {"seconds": time.time() - began}, add=True)
        if step < t.steps:
            print(f"Stopped at step {step}, saved. The same command goes on from there.")
    return step >= t.steps


def exit_quietly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
