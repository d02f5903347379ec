"""Converts a checkpoint of `soda train` to a Hugging Face model, with the flags of Megatron-LM's
tools/checkpoint/convert.py.

The model is a stock Qwen3ForCausalLM with its tokenizer and codec. Its logits are compared with the checkpoint's before
the tool finishes. `soda export RUN` does the same without these flags.

examples:
  python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf --load-dir runs/mine --save-dir hf/mine
  python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf \\
      --load-dir runs/mine/checkpoints/step_00001000 --save-dir hf/mine-1000
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flags import parse, run

from megatron_soda.commands.resolve import resolve
from megatron_soda.config import choice
from megatron_soda.errors import SodaError

OURS, HUGGING_FACE = ("core", "mcore", "megatron"), "hf"  # Megatron-LM's names for torch_dist checkpoints
NO_SIZE = "a checkpoint can be read at any layout, and a Hugging Face model has none. Leave it out."
ELSEWHERE = {
    "--target-tensor-parallel-size": NO_SIZE,
    "--target-pipeline-parallel-size": NO_SIZE,
    "--max-queue-size": "there is no queue: one process does it all. Leave it out.",
    "--no-checking": "logits are always compared. Leave it out.",
    "--tokenizer-model": "the tokenizer comes from the run's data. Leave it out.",
    "--megatron-path": "megatron-core is installed. Leave it out.",
}


def main() -> None:
    args = parse(parser(), ELSEWHERE)
    choice("--model-type", args.model_type, ("GPT",))
    check_direction(args.loader, args.saver)
    load, save = Path(args.load_dir), Path(args.save_dir)
    if not load.is_dir():
        raise SodaError(f"--load-dir {load}: no such folder")
    of_step = (load / "checkpoint.json").is_file()
    if save.exists() and not (save.is_dir() and ((save / "soda.json").is_file() or not any(save.iterdir()))):
        raise SodaError(f"--save-dir {save}: something else already exists there; give a new folder")
    from megatron_soda.hf.export import export

    recipe = resolve(load.resolve().parent.parent if of_step else load, [])
    export(recipe, load if of_step else None, save)


def check_direction(loader: str, saver: str) -> None:
    """Raises SodaError unless the conversion is from a checkpoint to Hugging Face."""
    if saver in OURS and loader not in OURS:
        raise SodaError(f"--loader {loader} --saver {saver}: from Hugging Face to a checkpoint is not supported yet")
    if saver in OURS:
        raise SodaError(f"--saver {saver}: not needed: `soda train` reads a checkpoint at any layout")
    choice("--loader", loader, OURS)
    choice("--saver", saver, (HUGGING_FACE,))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--model-type", required=True, metavar="GPT")
    made.add_argument("--loader", default="core", help=f"{' or '.join(OURS)}: all mean a checkpoint from soda train")
    made.add_argument("--saver", required=True, help=HUGGING_FACE)
    made.add_argument("--load-dir", required=True, help="a run (its newest checkpoint), or RUN/checkpoints/STEP")
    made.add_argument("--save-dir", required=True, help="folder for the model; an existing model is replaced")
    return made


if __name__ == "__main__":
    run(main)
