"""The slot grammar as a logits processor of vLLM 0.32, for both of its model runners:

    vllm serve FOLDER --logits-processors megatron_soda.serving.vllm:SlotGrammar

FOLDER is a model that `soda export` wrote. A request is sampled freely with "vllm_xargs": {"soda_grammar": 0} over
HTTP, or SamplingParams(extra_args={"soda_grammar": 0}).
"""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from ..vocab import TokenSpace
from .slots import PROCESSOR, DeviceTokens, ListedTokens, SlotMask

SWITCH = "soda_grammar"
log = init_logger(f"vllm.{__name__}")  # vLLM prints what loggers of that name say


def wanted(params: Any) -> bool:
    """Whether a request follows the grammar. ValueError if its setting is neither 0 nor 1."""
    value = (params.extra_args or {}).get(SWITCH, 1)
    if value not in (0, 1):
        raise ValueError(f"{SWITCH} is {value!r}; it may be 0 or 1")
    return bool(value)


class _Switch:
    """What both interfaces check of a request."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        wanted(sampling_params)


class GrammarV1(_Switch, ProcessorV1):
    """For the first model runner: tokens are lists on the host, and requests move within the batch."""

    def __init__(self, device: torch.device, space: TokenSpace) -> None:
        self.device, self.mask = device, SlotMask(space, device)
        self.requests: dict[int, ListedTokens] = {}  # by their place in the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.requests, batch_update, self._begin)

    def _begin(self, params: Any, prompt: list[int] | None, output: list[int]) -> ListedTokens | None:
        if not wanted(params):
            return None
        state, wrong = self.mask.walk(prompt or ())
        if wrong:
            log.warning("a prompt is not the start of a document, so its answer is empty: %s", wrong)
        return ListedTokens(self.mask, state, output)

    def apply(self, logits: Tensor) -> Tensor:
        if not self.requests:
            return logits
        states = [self.mask.free] * len(logits)
        for place, request in self.requests.items():
            states[place] = request.now()
        return self.mask.apply(logits, torch.tensor(states).to(self.device, non_blocking=True))


class GrammarV2(_Switch, ProcessorV2):
    """For model runner 2: tokens stay on the device, and a request keeps its slot."""

    def __init__(self, states: Any, space: TokenSpace) -> None:
        self.states = states
        self.tokens = DeviceTokens(SlotMask(space, states.device), states.max_num_reqs, states.device)
        self.constrained = [False] * states.max_num_reqs
        self.new: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.constrained[req_idx] = wanted(sampling_params)
        self.new.append(req_idx)
        return self.constrained[req_idx]

    def apply_staged_writes(self) -> None:
        if self.new:
            lengths = self.states.prefill_len.np[self.new].tolist()
            constrained = [self.constrained[slot] for slot in self.new]
            self.tokens.begin(self.new, lengths, constrained, self.states.all_token_ids.gpu)
            self.new = []

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        if not any(self.constrained[slot] for slot in ctx.idx_mapping_np):
            return logits
        states = self.tokens.advance(ctx.expanded_idx_mapping.long(), ctx.input_ids, ctx.pos)
        return self.tokens.mask.apply(logits, states)


class Absent(ProcessorV1, ProcessorV2):
    """Leaves every request as it is."""

    def __init__(self, *_: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        return logits


class SlotGrammar(_Switch, Absent):
    """What vLLM loads by name, whichever runner it starts: the processor for that runner is made in its place.

    ValueError for a model that `soda export` did not write, and where vLLM does not show a processor all tokens.
    """

    def __new__(cls, config: Any, *rest: Any) -> Any:
        """rest: device and whether memory is pinned from the first runner; the requests' states from the second."""
        if config.speculative_config is not None:
            raise ValueError("the slot grammar cannot be used with speculative decoding")
        if config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError("the slot grammar cannot be used with --enable-batch-sharded-sampling")
        space = read_space(config.model_config)
        return GrammarV1(rest[0], space) if len(rest) == 2 else GrammarV2(rest[0], space)


class InstalledSlotGrammar(SlotGrammar):
    """What vLLM finds by itself where this package is installed. Other models are left alone."""

    def __new__(cls, config: Any, *rest: Any) -> Any:
        named = config.model_config.logits_processors or ()
        if PROCESSOR in named or SlotGrammar in named or not _described(config.model_config).is_file():
            return Absent()
        if len(rest) == 2 and config.scheduler_config.async_scheduling:
            # vLLM then fills in the tokens of the step before only for processors that are named.
            raise ValueError(f"add --logits-processors {PROCESSOR}, or --no-async-scheduling")
        return super().__new__(cls, config, *rest)


def _described(model: Any) -> Path:
    return Path(model.model) / "soda.json"


def read_space(model: Any) -> TokenSpace:
    """The token space of the model that vLLM serves."""
    path = _described(model)
    if not path.is_file():
        raise ValueError(f"{model.model}: not a folder that `soda export` wrote: there is no soda.json in it")
    space = TokenSpace(**json.loads(path.read_text(encoding="utf-8"))["space"])
    if space.size != model.get_vocab_size():
        raise ValueError(f"{path}: has {space.size:,} ids, the model {model.get_vocab_size():,}. Export the run again.")
    return space
