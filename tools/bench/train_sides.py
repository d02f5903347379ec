"""The sides of bench_train.py. Each is a function of a recipe that gives the function of one step."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from data_prep.interleave import text_first
from megatron_soda.config import Recipe
from megatron_soda.data.batch import Batch, Batcher
from megatron_soda.data.windows import Window
from megatron_soda.vocab import LLAMA3

RATE = 1e-4
STEPS = 4  # of different data
FORWARD_BACKWARD, OPTIMIZER = "forward_backward", "optimizer"
HEAD_ROWS = "head_rows"  # at a position, where not all
Result = dict[str, float]


class RandomWindows:
    """Windows of legal documents, text and then audio, out of random ids; the same for every side. `count` are made
    beforehand and come round again: making them takes longer than reading a store. `text`: its share of the tokens; 4 %
    in SODA's data."""

    def __init__(self, length: int, documents: int, count: int, text: float = 0.04) -> None:
        self.length, self.documents, self.text = length, documents, text
        self.windows = [self._make(sample) for sample in range(count)]

    def __getitem__(self, sample: int) -> Window:
        return self.windows[sample % len(self.windows)]

    def _make(self, sample: int) -> Window:
        rng = np.random.default_rng(sample)
        each = -(-(self.length + 1) // self.documents)
        words = 1 + int(each * self.text)
        frames = -(-each // LLAMA3.codebooks) - words // LLAMA3.codebooks
        made = []
        for _ in range(self.documents):
            text = rng.integers(0, LLAMA3.bos, words).tolist()
            codes = rng.integers(0, LLAMA3.entries, (frames, LLAMA3.codebooks))
            made.append(text_first([(text, codes)], LLAMA3))
        return Window(np.concatenate(made)[: self.length + 1], self.length)


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self.mark = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.parts[part] = now - self.mark
        self.mark = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Data:
    """The micro-batches of a step."""

    def __init__(self, recipe: Recipe, documents: int, device: torch.device) -> None:
        t = recipe.training
        self.windows = RandomWindows(recipe.data.sequence_length, documents, STEPS * t.global_batch_size)
        self.size, self.global_size = t.micro_batch_size, t.global_batch_size
        self.batcher = Batcher(LLAMA3, device=device)

    def step(self, number: int) -> list[Batch]:
        first = number * self.global_size
        starts = range(first, first + self.global_size, self.size)
        return [self.batcher([self.windows[s + i] for i in range(self.size)]) for s in starts]


def ours(recipe: Recipe, documents: int, _same_malloc: bool) -> Callable[[int], Result]:
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron_soda.training.step import Engine

    device = ranks.init(recipe)
    engine = Engine(recipe, LLAMA3, device)
    windows = RandomWindows(recipe.data.sequence_length, documents, STEPS * recipe.training.global_batch_size)

    def step(number: int) -> Result:
        clock = Clock(device)
        result = engine.train_step(windows, number * recipe.training.global_batch_size, RATE)
        clock.lap("step")
        seconds = engine.seconds.take()
        assert result.loss is not None
        return {
            "loss": result.loss,
            FORWARD_BACKWARD: clock.parts["step"] - seconds[OPTIMIZER],
            OPTIMIZER: seconds[OPTIMIZER],
            **({HEAD_ROWS: engine.head_rows} if engine.head_rows else {}),
        }

    return step


def megatron_core(recipe: Recipe, documents: int, _same_malloc: bool) -> Callable[[int], Result]:
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_soda.model.gpt import initialise, transformer_config
    from megatron_soda.model.rows import padded_size
    from megatron_soda.parallel.speed import choose_backend

    device = ranks.init(recipe)
    m, d, t = recipe.model, recipe.data, recipe.training
    if choose_backend(t.backend) == "local":  # whose fused functions are ours
        recipe = replace(recipe, training=replace(t, fuse_swiglu=False, fuse_rope=False))
    config = transformer_config(recipe)
    if choose_backend(t.backend) == "transformer_engine":
        spec: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True, use_te_activation_func=True)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_size(LLAMA3, 1),
        max_sequence_length=d.sequence_length,
        share_embeddings_and_output_weights=bool(m.tie_embeddings),
        position_embedding_type="rope",
        rotary_base=m.rope_theta,
        rope_scaling=m.rope_scaling_factor != 1.0,
        rope_scaling_factor=m.rope_scaling_factor,
    )
    initialise(model, LLAMA3, recipe)
    model = model.to(device=device, dtype=config.params_dtype)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    half = recipe.precision.dtype != "fp32"
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=RATE,
            weight_decay=recipe.optimizer.weight_decay,
            adam_beta1=recipe.optimizer.beta1,
            adam_beta2=recipe.optimizer.beta2,
            adam_eps=recipe.optimizer.epsilon,
            clip_grad=recipe.optimizer.clip_grad,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
        ),
        [ddp],
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    schedule: Any = get_forward_backward_func()
    data = Data(recipe, documents, device)

    def of_losses(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=device), {"loss": total.detach()}

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return model(batch.tokens, batch.position_id, None, labels=batch.labels), of_losses

    def step(number: int) -> Result:
        clock = Clock(device)
        ddp.train()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        results = schedule(
            forward_step_func=forward_step,
            data_iterator=iter(data.step(number)),
            model=ddp,
            num_microbatches=t.global_batch_size // t.micro_batch_size,
            seq_length=d.sequence_length,
            micro_batch_size=t.micro_batch_size,
            forward_only=False,
        )
        clock.lap(FORWARD_BACKWARD)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = RATE, recipe.optimizer.weight_decay * group["wd_mult"]
        optimizer.step()
        clock.lap(OPTIMIZER)
        loss = sum(float(result["loss"]) for result in results) / (t.global_batch_size * d.sequence_length)
        return {"loss": loss, **clock.parts}

    return step


def transformers(recipe: Recipe, documents: int, same_malloc: bool) -> Callable[[int], Result]:
    from transformers import AutoModelForCausalLM

    from megatron_soda.parallel import cpu

    if not same_malloc:
        cpu._installed = True  # the import below finds it done, and torch stays as it is
    from megatron_soda.hf.export import hf_config
    from megatron_soda.hf.load import quiet_transformers

    quiet_transformers()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t = recipe.training
    torch.manual_seed(recipe.seed)
    config = hf_config(recipe.model, LLAMA3, recipe.data.sequence_length)
    config.use_cache = False
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    if t.recompute:
        model.gradient_checkpointing_enable()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=RATE,
        betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
        eps=recipe.optimizer.epsilon,
        fused=True,
    )
    half = partial(torch.autocast, device.type, torch.bfloat16, enabled=recipe.precision.dtype != "fp32")
    data = Data(recipe, documents, device)

    def step(number: int) -> Result:
        clock = Clock(device)
        optimizer.zero_grad()
        batches = data.step(number)
        total = 0.0
        for batch in batches:
            with half():
                loss = model(batch.tokens, labels=batch.tokens).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        clock.lap(FORWARD_BACKWARD)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        clock.lap(OPTIMIZER)
        return {"loss": total, **clock.parts}

    return step


def legal(recipe: Recipe, documents: int, same_malloc: bool) -> Callable[[int], Result]:
    return ours(replace(recipe, training=replace(recipe.training, head_rows="legal")), documents, same_malloc)


SIDES = {"ours": ours, "legal": legal, "megatron-core": megatron_core, "transformers": transformers}
