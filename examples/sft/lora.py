"""LoRA on an exported model, through peft, with the documents and masks of `soda train`. peft is not a dependency:

    .venv/bin/pip install peft
    .venv/bin/python examples/sft/lora.py runs/quickstart/hf runs/sft/data runs/sft_lora

The adapters are merged into OUT, a model like any that `soda export` writes: `soda evaluate`, `soda transcribe --model`
and `soda serve` take it. One process, on the GPU if there is one.
"""

import argparse
import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_soda.data.batch import Batcher
from megatron_soda.data.packed import Packed, without_response
from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError, say
from megatron_soda.files import check_writable, read_sealed, replace_folder, write_sealed
from megatron_soda.hf.load import DESCRIPTION, LoadedModel, file_hashes, load_model
from megatron_soda.hf.weights import Weights
from megatron_soda.training.schedule import learning_rate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that `soda export` wrote")
    parser.add_argument("data", type=Path, help="a data folder of `soda prepare`, with the model's codec and tokenizer")
    parser.add_argument("out", type=Path, help="where the merged model goes")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window (%(default)s)")
    parser.add_argument("--prompt-spans", type=int, default=1, help="leading spans without a loss (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="windows a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="(%(default)s)")
    return parser.parse_args()


class Data:
    """Batches of packed windows for a model."""

    def __init__(self, loaded: LoadedModel, path: Path, options: argparse.Namespace) -> None:
        store = Store(path)
        store.check_space(loaded.space, f"the model ({loaded.folder})")
        store.check_made_by(loaded.made_by, f"the model ({loaded.folder})")
        if problem := without_response(store, options.prompt_spans, options.length):
            raise SodaError(problem)
        self.packed = Packed(store, options.length, options.seed, options.prompt_spans)
        self.batcher = Batcher(loaded.space, device=loaded.device)

    def nll(self, model: Any, first: int, count: int) -> tuple[Tensor, int]:
        """Sum over the labels of `count` windows that have a weight, in nats, and the number of those labels. The head
        is computed for them alone."""
        batch = self.batcher([self.packed[first + i] for i in range(count)])
        segments = batch.segment_id
        inside = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
        hidden = model.model(input_ids=batch.tokens, attention_mask=inside, use_cache=False).last_hidden_state
        counts = batch.loss_weight > 0
        logits = model.lm_head(hidden[counts]).float()
        return torch.nn.functional.cross_entropy(logits, batch.labels[counts], reduction="sum"), int(counts.sum())

    @torch.no_grad()
    def held_out(self, model: Any) -> float:
        """NLL per label over all windows."""
        found = [self.nll(model, i, 1) for i in range(self.packed.count)]
        return sum(float(nll) for nll, _ in found) / sum(labels for _, labels in found)


def train(loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Trains adapters on all linear layers but the head, and merges them into the model."""
    from peft import LoraConfig, get_peft_model

    data, held_out = (Data(loaded, options.data / side, options) for side in ("train", "valid"))
    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted: Any = get_peft_model(loaded.model.float(), config)
    adapted.print_trainable_parameters()
    model = adapted.get_base_model()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.01)
    shape: dict[str, Any] = {"schedule": "cosine", "warmup_share": 0.03, "decay_share": 0.0, "final_share": 0.1}
    print(f"held-out NLL of the responses: {held_out.held_out(model):.4f} nats per token", flush=True)
    began = time.monotonic()
    for step in range(options.steps):
        rate = learning_rate(step, steps=options.steps, peak=options.rate, **shape)
        for group in optimizer.param_groups:
            group["lr"] = rate
        nll, labels = data.nll(model, step * options.batch, options.batch)
        (nll / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step + 1 == options.steps:
            seconds = time.monotonic() - began
            print(f"step {step + 1}  loss {nll.item() / labels:.4f}  {seconds:.0f} s", flush=True)
    print(f"held-out NLL of the responses: {held_out.held_out(model):.4f} nats per token")
    loaded.model = adapted.merge_and_unload()


def save(loaded: LoadedModel, out: Path) -> None:
    """The model's folder with the new weights, described anew."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(loaded.folder, temporary)
    for old in temporary.glob("*.safetensors*"):
        old.unlink()
    loaded.model.to(Weights(loaded.folder).dtype).save_pretrained(temporary)
    described = read_sealed(temporary / DESCRIPTION)
    new = [path.name for path in temporary.glob("*.safetensors*")]
    files = file_hashes(temporary, {*described["files"], *new})
    key = hashlib.sha256(str(sorted(files.items())).encode()).hexdigest()[:16]
    described.update(name=f"{loaded.name}-lora", key=key, files=files)
    del described["crc32"]
    write_sealed(temporary / DESCRIPTION, described)
    replace_folder(temporary, out)
    print(f"{out}: the merged model")


def check_out(options: argparse.Namespace) -> None:
    """Before the work: what is at OUT is replaced only if it is an exported model, and not the one that is read."""
    out = options.out.resolve()
    if out == options.model.resolve():
        raise SodaError(f"{options.out}: is the model itself; name another folder")
    if options.out.exists() and not (options.out / DESCRIPTION).is_file():
        raise SodaError(f"{options.out}: is there already and is no exported model; name another folder")
    check_writable(out.parent)


def main() -> None:
    options = arguments()
    check_out(options)
    loaded = load_model(options.model)
    train(loaded, options)
    save(loaded, options.out)


if __name__ == "__main__":
    try:
        main()
    except SodaError as error:
        say(f"error: {error}")
        sys.exit(2)
