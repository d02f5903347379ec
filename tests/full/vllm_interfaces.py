"""Both interfaces of vLLM, with its own code around our processors. test_vllm.py runs this in vLLM's environment; MODEL
is an exported folder, DOCUMENTS a file with lists of ids, a few documents each.

Model runner 2 needs a GPU. Here its request states, loader and sampler run on the CPU, up to the choice of a token;
what its kernels do, writing tokens where processors read them, is done by hand.
"""

# pyright: reportMissingImports=false

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality, build_logitsprocs
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from megatron_soda.serving.slots import PROCESSOR
from megatron_soda.serving.vllm import Absent, GrammarV1, GrammarV2, InstalledSlotGrammar, SlotGrammar
from megatron_soda.vocab import Grammar, TokenSpace

CPU = torch.device("cpu")
SLOTS, CONTEXT = 6, 160
FREE = SamplingParams(temperature=0.0, extra_args={"soda_grammar": 0})
BOUND = SamplingParams(temperature=0.0)
FOLDER = os.environ["MODEL"]
DOCUMENTS: list[list[int]] = json.loads(Path(os.environ["DOCUMENTS"]).read_text())
SPACE = TokenSpace(**json.loads((Path(FOLDER) / "soda.json").read_text())["space"])
ANY = np.ones(SPACE.size, bool)


def config(folder: str = FOLDER, size: int = SPACE.size, named: tuple[Any, ...] = (PROCESSOR,)) -> Any:
    model = SimpleNamespace(model=folder, logits_processors=list(named), get_vocab_size=lambda: size)
    return SimpleNamespace(
        model_config=model,
        speculative_config=None,
        reasoning_config=None,
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=SLOTS),
    )


def legal_after(ids: list[int]) -> np.ndarray:
    """bool (ids,): what may follow, by the grammar alone."""
    grammar, kinds = Grammar(SPACE), SPACE.kind_table()
    state = Grammar.START
    for token in ids:
        state = grammar.step.get((state, int(kinds[token])), -1)
        if state < 0:
            return np.arange(SPACE.size) == SPACE.eos
        if state == Grammar.END:
            state = Grammar.START
    return grammar.legal()[state]


def check(logits: torch.Tensor, wanted: list[np.ndarray]) -> None:
    assert np.array_equal(torch.isfinite(logits).numpy(), np.stack(wanted))


class Runner2:
    """The parts of model runner 2 around a sampler, on the CPU."""

    def __init__(self) -> None:
        settings = config()
        self.states = RequestState(SLOTS, CONTEXT, CONTEXT, 0, SPACE.size, CPU)
        named = settings.model_config.logits_processors
        processors = build_custom_logits_processors(settings, self.states, False, named)
        assert isinstance(processors[-1], GrammarV2)
        self.sampler = Sampler(settings, SLOTS, SPACE.size, CPU, self.states, custom_logits_processors=processors)
        self.tokens: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}  # tokens that the model was given
        self.free: set[str] = set()

    def add(self, name: str, ids: list[int], prompt: int, params: SamplingParams) -> None:
        """A request, or one that was preempted after len(ids) - prompt tokens of its answer."""
        states = self.states
        states.add_request(name, prompt, ids, 0, 50)
        slot = states.req_id_to_index[name]
        for written in (states.all_token_ids, states.total_len, states.num_computed_tokens):
            written.clear_staged_writes()  # only kernels can write them
        states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.sampler.add_request(slot, params)
        self.tokens[name], self.done[name] = list(ids), 0
        self.free.discard(name)
        if params is FREE:
            self.free.add(name)

    def step(self, names: list[str], prefill: int = CONTEXT) -> None:
        """Masks random logits, and looks which are left. prefill: most tokens of a prompt at once."""
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        for name in names:
            filled = int(self.states.prefill_len.np[self.states.req_id_to_index[name]])
            left = filled - self.done[name]
            self.done[name] += min(prefill, left) if left > 0 else 1
        slots = np.array([self.states.req_id_to_index[name] for name in names])
        rows = torch.from_numpy(slots).int()
        places = torch.tensor([self.done[name] - 1 for name in names])
        given = torch.tensor([self.tokens[name][self.done[name] - 1] for name in names], dtype=torch.int32)
        logits, none = torch.randn(len(names), SPACE.size), torch.zeros(len(names), dtype=torch.int32)
        args = (logits, rows, rows, slots, places, given, none, places.numpy() + 1)
        found = self.sampler.apply_sampling_params(*args, skip_top_k_top_p=True)
        # A prompt that is only partly given is not sampled from.
        for row, name in enumerate(names):
            if self.done[name] == len(self.tokens[name]):
                check(found[row : row + 1], [ANY if name in self.free else legal_after(self.tokens[name])])


@pytest.fixture(autouse=True)
def no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # host memory that a GPU reads
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def test_second_runner() -> None:
    """Prompts of unequal length, given in parts; rows in any order, not all in every step; an answer that leaves the
    grammar; a request that was preempted and comes back in another's slot."""
    rng = np.random.default_rng(0)
    runner = Runner2()
    for number, cut in enumerate((1, 5, 9, 2, 4)):
        runner.add(f"r{number}", DOCUMENTS[number][:cut], cut, FREE if number == 3 else BOUND)
    runner.add("r5", [SPACE.text_end, SPACE.bos], 2, BOUND)
    names = [f"r{number}" for number in range(6)]
    while waiting := [name for name in names if runner.done[name] < len(runner.tokens[name])]:
        runner.step(waiting, prefill=3)
    for turn in range(25):
        some = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
        for name in some:
            follows = DOCUMENTS[int(name[1:])][len(runner.tokens[name]) :]
            runner.tokens[name].append(follows[0] if follows and turn < 20 else int(rng.integers(SPACE.size)))
        runner.step(some)
        if turn == 10:
            runner.states.remove_request("r1")
            runner.states.remove_request("r2")
            runner.add("r1", runner.tokens["r1"], 5, BOUND)
            runner.step(["r1"])
            names.remove("r2")


def test_first_runner() -> None:
    """Requests that are added, removed, moved and swapped, as its batches are."""
    loaded = build_logitsprocs(config(), CPU, False, False, (PROCESSOR,))
    (processor,) = [one for one in loaded.all if isinstance(one, GrammarV1)]
    assert processor in loaded.non_argmax_invariant
    outputs: list[list[int]] = [[], DOCUMENTS[1][6:9], [], [], []]
    prompts = [DOCUMENTS[number][:cut] for number, cut in enumerate((1, 6, 2, 4, 3))]

    def added(place: int, number: int) -> Any:
        return place, FREE if number == 2 else BOUND, prompts[number], outputs[number]

    def step(order: list[int], *update: Any) -> None:
        processor.update_state(BatchUpdate(len(order), *update) if update else None)
        found = processor.apply(torch.randn(len(order), SPACE.size))
        check(found, [ANY if number == 2 else legal_after(prompts[number] + outputs[number]) for number in order])
        for number in order:
            outputs[number].append(DOCUMENTS[number][len(prompts[number]) + len(outputs[number])])

    step([0, 1, 2, 3], [], [added(number, number) for number in range(4)], [])
    step([0, 1, 2, 3])
    step([2, 1, 0, 3], [], [], [(0, 2, MoveDirectionality.SWAP)])
    step([2, 3, 0], [1], [], [(3, 1, MoveDirectionality.UNIDIRECTIONAL)])
    step([4, 3, 0], [], [added(0, 4)], [])  # in the place of the free one
    step([4, 3, 0])


def loaded(settings: Any) -> list[type]:
    """Our processors, as either runner would make them."""
    named = settings.model_config.logits_processors
    first = build_logitsprocs(settings, CPU, False, False, named)
    states = RequestState(SLOTS, CONTEXT, CONTEXT, 0, SPACE.size, CPU)
    second = build_custom_logits_processors(settings, states, False, named)
    return [type(one) for one in (*first.all, *second) if type(one).__module__ == SlotGrammar.__module__]


def test_what_is_loaded() -> None:
    """By its entry point, by name, or both: it masks once. Other models are left alone."""
    assert loaded(config(named=())) == [GrammarV1, GrammarV2]
    assert loaded(config(folder="/nowhere", named=())) == [Absent, Absent]
    both = config()
    both.scheduler_config.async_scheduling = True
    assert loaded(both) == [Absent, GrammarV1, Absent, GrammarV2]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"/nowhere: .* no soda.json"):
        loaded(config(folder="/nowhere"))
    with pytest.raises(ValueError, match=r"the model 7. Export the run again"):
        loaded(config(size=7))
    unnamed = config(named=())
    unnamed.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="add --logits-processors megatron_soda"):
        loaded(unnamed)
    drafting = config()
    drafting.speculative_config = object()
    with pytest.raises(ValueError, match="speculative decoding"):
        SlotGrammar(drafting, CPU, False)


@pytest.mark.parametrize("value", ["no", 2, None])
def test_a_setting_that_says_nothing(value: Any) -> None:
    with pytest.raises(ValueError, match="it may be 0 or 1"):
        InstalledSlotGrammar.validate_params(SamplingParams(extra_args={"soda_grammar": value}))
