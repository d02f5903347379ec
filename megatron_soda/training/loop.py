"""The training loop: steps, metrics, checkpoints, resume, branching off another run, and a clean stop on Ctrl-C."""

import math
import signal
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import Recipe, save_recipe
from ..data.mixture import Mixture, Stage
from ..data.store import Store
from ..data.windows import Windows
from ..errors import SodaError
from ..model.size import parameter_count, train_flops
from ..parallel import preflight, ranks
from ..run_folder import record_environment, record_timing
from . import checkpoint
from .metrics import Metrics, check_wandb, memory_gib, mfu, peak_tflops
from .schedule import learning_rate
from .step import Engine, loss_of, nll_vector


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


@dataclass
class Branch:
    """Where a run left the one it branched off: nothing, for most."""

    step: int = 0
    samples: int = 0
    consumed: dict[str, int] = field(default_factory=dict)  # samples of each corpus
    origin: str = ""  # the checkpoint


def open_corpora(recipe: Recipe, branch: Branch) -> Mixture:
    """The training data as a stream of samples, from the recipe's corpora in their shares."""
    d = recipe.data
    stores = {name: Store(path) for name, path in d.corpora.items()} or {"train": Store(recipe.data_folder / "train")}
    corpora = {
        # Corpora of one size must not go through their windows in the same order: they may be of the same documents.
        name: Windows(store, d.sequence_length, recipe.seed + zlib.crc32(name.encode()), d.align_windows)
        for name, store in stores.items()
    }
    batch = recipe.training.global_batch_size
    # Stages are counted from step 0 of the run branched off, so that the same mix goes on with the same samples.
    stages = [Stage(branch.samples + (stage.from_step - branch.step) * batch, stage.shares) for stage in d.mix]
    if stages and d.mix[0].from_step > branch.step:
        raise SodaError(
            f"data.mix: the first stage is from_step {d.mix[0].from_step}, but training begins at step {branch.step}"
        )
    stages = stages or [Stage(branch.samples, {next(iter(corpora)): 1.0})]
    return Mixture(corpora, stages, branch.samples, branch.consumed)


def train(recipe: Recipe) -> bool:
    """Runs the recipe from its newest whole checkpoint to its last step. False if it was asked to stop before.

    Raises SodaError for a layout or data that do not fit, a checkpoint of another model, vocabulary or optimizer,
    ranks that disagree, and a loss that is not finite.
    """
    began = time.time()
    run, t = Path(recipe.run), recipe.training
    check_wandb(recipe)
    device = ranks.init(recipe)
    rank_map = preflight.check_ranks(recipe, device)
    first = ranks.is_first()

    origin = checkpoint.newest_whole(run)
    branching = origin is None and bool(t.branch_from)
    if branching:
        origin = Path(t.branch_from)
        problems = checkpoint.damage(origin)
        if problems:
            raise SodaError(f"training.branch_from={origin}: {problems[0]}")
    space = _any_store(recipe).space
    description = checkpoint.describe(recipe, space)
    saved = {"step": 0, "samples": 0, "branch": {}, "consumed": {}}
    if origin is not None:
        saved = checkpoint.read_description(origin, recipe.model, space, description["optimizer"])
    if branching:
        saved["branch"] = {"origin": t.branch_from, **{name: saved[name] for name in ("step", "samples", "consumed")}}
    branch = Branch(**saved["branch"])
    if t.branch_from and branch.origin != t.branch_from:
        raise SodaError(
            f"{run} has checkpoints already, and they did not branch off training.branch_from={t.branch_from} but off "
            f"{branch.origin or 'nothing'}. Give the leg a `run` folder of its own."
        )
    step: int = saved["step"]
    if branching and step >= t.steps:
        raise SodaError(
            f"training.steps={t.steps} is not past step {step}, where the run branches off. Steps count on: for 1000 "
            f"more set training.steps={step + 1000}"
        )
    windows = open_corpora(recipe, branch)

    def first_sample(of_step: int) -> int:
        return branch.samples + (of_step - branch.step) * t.global_batch_size

    description["data"] = _identity(recipe, windows)
    _check_same_data(saved, first_sample(step), windows, description["data"], t.global_batch_size)
    valid = Windows(Store(recipe.data_folder / "valid"), recipe.data.sequence_length, recipe.seed)
    valid.store.check_space(space, "the training data")
    if step >= t.steps:
        if first:
            print(f"{run}: all {step} steps are done. To train longer, raise training.steps.")
        return True

    engine = Engine(recipe, space, device)
    if origin is not None:
        checkpoint.load(origin, engine.models, engine.optimizer.inner)
    saver = checkpoint.Saver(recipe, engine.models, engine.optimizer.inner, description)
    dist.barrier()  # nobody writes into the run folder before everybody has read it
    metrics = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_tflops(recipe, name)
    if first:
        run.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run / "recipe.yaml")
        parameters = parameter_count(recipe.model, space)
        record_environment(
            run,
            layout=ranks.describe(recipe),
            layers=engine.backend,
            optimizer=engine.optimizer.backend,
            device=name,
            peak_tflops=peak,
            parameters=parameters,
        )
        metrics = Metrics(recipe, step)
        here = f"from step {step}" if step else "from the start"
        if dist.get_world_size() > 1:
            print(rank_map)
        print(
            f"{parameters:,} parameters; {ranks.describe(recipe)}; {engine.backend} layers, {engine.optimizer.backend}"
        )
        count = sum(corpus.count for corpus in windows.corpora.values())
        print(f"{count:,} windows of {windows.length} in {len(windows.corpora)} corpora; {here}", flush=True)

    stop = StopRequest(device)
    columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    progress = Progress(*columns, TimeRemainingColumn(), disable=not first)
    names = space.class_names
    tokens_per_step = t.global_batch_size * windows.length
    flops = train_flops(recipe.model, space, windows.length)
    mark, marked = time.time(), step
    try:
        with progress:
            bar = progress.add_task("train", total=t.steps, completed=step, note="")
            while step < t.steps:
                rate = learning_rate(
                    step,
                    schedule=t.schedule,
                    steps=t.steps,
                    peak=t.learning_rate,
                    warmup_share=t.warmup_share,
                    decay_share=t.decay_share,
                    branched_at=branch.step,
                )
                result = engine.train_step(windows, first_sample(step), rate)
                step += 1
                if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                    saver.finish()  # what is being written is from before, and whole
                    raise SodaError(
                        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}. Lower "
                        f"training.learning_rate (now {t.learning_rate:g}) and run again: it goes on from the last "
                        "checkpoint."
                    )
                if metrics and (step % t.log_every == 0 or step == t.steps or step == 1):
                    now = time.time()
                    speed = (step - marked) * tokens_per_step / (now - mark)
                    parts = engine.seconds.take()
                    metrics.write(
                        step,
                        {
                            "tokens": first_sample(step) * windows.length,
                            "loss": result.loss,
                            "grad_norm": result.grad_norm,
                            "learning_rate": rate,
                            "tokens_per_second": speed,
                            "mfu": mfu(flops, speed, dist.get_world_size(), peak),
                            "memory_gib": memory_gib(),
                            "seconds": now - began,
                            "step_seconds": {part: s / (step - marked) for part, s in parts.items()},
                            "nll": nll_vector(result.sums, names),
                        },
                    )
                    mark, marked = now, step
                    note = f"loss {result.loss:.3f}  {speed:,.0f} tokens/s"
                else:
                    note = progress.tasks[bar].fields["note"]
                progress.update(bar, completed=step, note=note)
                stopping = stop.agreed()
                if step % t.valid_every == 0 or step == t.steps:
                    with engine.seconds.of("validate"):
                        sums = engine.validate(valid, t.valid_windows)
                    if metrics:
                        metrics.write(step, {"valid_loss": loss_of(sums), "valid_nll": nll_vector(sums, names)})
                with engine.seconds.of("save"):
                    saver.poll()
                    if step % t.save_every == 0 or step == t.steps or stopping:
                        samples = first_sample(step)
                        used = {"tokens": samples * windows.length, "consumed": windows.consumed(samples)}
                        saver.start(step, {"samples": samples, "branch": saved["branch"], **used})
                if stopping:
                    break
            saver.finish()
    finally:
        stop.restore()
        if metrics:
            metrics.close()
    if first:
        record_timing(run, "train", {"seconds": time.time() - began}, add=True)
        if step < t.steps:
            print(f"Stopped at step {step}, saved. The same command goes on from there.")
    return step >= t.steps


def _any_store(recipe: Recipe) -> Store:
    paths = [*recipe.data.corpora.values(), recipe.data_folder / "train"]
    return Store(paths[0])


def _identity(recipe: Recipe, windows: Mixture) -> dict[str, Any]:
    """All that decides which tokens sample n is, beside the shares."""
    tokens = {name: corpus.store.size for name, corpus in windows.corpora.items()}
    d = recipe.data
    whole = {"seed": recipe.seed, "data.sequence_length": d.sequence_length, "data.align_windows": d.align_windows}
    return {**whole, "tokens": tokens}


def _check_same_data(saved: dict[str, Any], samples: int, windows: Mixture, identity: dict, batch: int) -> None:
    """The steps behind us must have used up what the recipe says they have, or data would be lost or repeated."""
    if saved["samples"] != samples:
        raise SodaError(
            f"the checkpoint of step {saved['step']} has seen {saved['samples']} samples, and by this recipe "
            f"it would be {samples}: training.global_batch_size={batch} is not what it was. Set it back, or branch "
            "a new run off: training.branch_from"
        )
    before, now = ({k: v for k, v in used.items() if v} for used in (saved["consumed"], windows.consumed(samples)))
    if before != now:
        raise SodaError(
            f"the shares of steps that are done were changed: by data.mix, step {saved['step']} has used up "
            f"{now} samples, but the checkpoint says {before}. Leave the stages that are done as they were, and add "
            f"one with from_step: {saved['step']} or later"
        )
    was = saved.get("data", identity)
    for key, value in identity.items():
        pairs = [(key, was[key], value)]
        if key == "tokens":  # of corpora that are new, or were never used, nothing can be repeated
            pairs = [(f"corpus {n}: tokens", was[key][n], value[n]) for n in value if n in was[key] and before.get(n)]
        for what, old, new in pairs:
            if old != new:
                raise SodaError(
                    f"{what} was {old} when the checkpoint of step {saved['step']} was written, and is {new}: the "
                    "data would come in another order, and some again. Set it back, or start a new run."
                )


def exit_quietly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
