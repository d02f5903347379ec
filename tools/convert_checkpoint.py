"""Checkpoints to Hugging Face and back, by the flags of Megatron-LM's tools/checkpoint/convert.py.

From a checkpoint of `soda train`: a stock Qwen3ForCausalLM with its tokenizer and codec, its logits compared with those
of the checkpoint. Without these flags: `soda export RUN`.
From a Qwen3ForCausalLM: a run folder with a checkpoint of step 0 that any layout reads, to train on. A text model gets
the markers and the audio codes. Without these flags: `soda import FOLDER run=RUN`, which has more settings.

examples:
  python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf --load-dir runs/mine --save-dir hf/mine
  python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf \\
      --load-dir runs/mine/checkpoints/step_00001000 --save-dir hf/mine-1000
  python tools/convert_checkpoint.py --model-type GPT --loader hf --saver core --load-dir hf/mine --save-dir runs/again
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flags import parse, run

from megatron_soda.commands.resolve import resolve
from megatron_soda.config import choice
from megatron_soda.errors import SodaError

OURS, HUGGING_FACE = ("core", "mcore", "megatron"), "hf"  # Megatron-LM's names of torch_dist checkpoints
FROM_HUGGING_FACE = (HUGGING_FACE, "llama_mistral")  # with --checkpoint-type hf the second reads such folders there
NO_SIZE = "a checkpoint is read at any layout, and a Hugging Face model has none. Leave it out."
ELSEWHERE = {
    "--target-tensor-parallel-size": NO_SIZE,
    "--target-pipeline-parallel-size": NO_SIZE,
    "--max-queue-size": "there is no queue: one process does it all. Leave it out.",
    "--no-checking": "logits are always compared. Leave it out.",
    "--tokenizer-model": "the tokenizer is that of the run's data, or that of the model. Leave it out.",
    "--model-size": "config.json has the sizes. Leave it out.",
    "--true-vocab-size": "the tokenizer says it. Leave it out.",
    "--make-vocab-size-divisible-by": "a checkpoint is padded for the layout that reads it. Leave it out.",
    "--bf16": "weights stay in the format they are in. Leave it out.",
    "--megatron-path": "megatron-core is installed. Leave it out.",
}


def main() -> None:
    args = parse(parser(), ELSEWHERE)
    choice("--model-type", args.model_type, ("GPT",))
    check_direction(args.loader, args.saver)
    choice("--checkpoint-type", args.checkpoint_type, ("hf",))
    load, save = Path(args.load_dir), Path(args.save_dir)
    if not load.is_dir():
        raise SodaError(f"--load-dir {load}: no such folder")
    if args.saver in OURS:
        import_folder(load, save)
        return
    of_step = (load / "checkpoint.json").is_file()
    if save.exists() and not (save.is_dir() and ((save / "soda.json").is_file() or not any(save.iterdir()))):
        raise SodaError(f"--save-dir {save}: something else already exists there; give a new folder")
    from megatron_soda.hf.export import export

    recipe = resolve(load.resolve().parent.parent if of_step else load, [])
    export(recipe, load if of_step else None, save)


def import_folder(load: Path, save: Path) -> None:
    from megatron_soda.hf.importing import import_model

    import_model(load, [], run=save)


def check_direction(loader: str, saver: str) -> None:
    """SodaError unless it is from a checkpoint to Hugging Face, or the other way round."""
    choice("--loader", loader, (*OURS, *FROM_HUGGING_FACE))
    choice("--saver", saver, (HUGGING_FACE, *OURS))
    if loader in OURS and saver in OURS:
        raise SodaError(f"--saver {saver}: not needed: `soda train` reads a checkpoint at any layout")
    if loader not in OURS and saver not in OURS:
        raise SodaError(f"--loader {loader} --saver {saver}: both are Hugging Face; there is nothing to convert")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--model-type", required=True, metavar="GPT")
    ours = f"{' or '.join(OURS)}: all mean a checkpoint of soda train"
    made.add_argument("--loader", default="core", help=f"{ours}; or {' or '.join(FROM_HUGGING_FACE)}")
    made.add_argument("--saver", required=True, help=f"{HUGGING_FACE}, or {', '.join(OURS)}")
    made.add_argument("--checkpoint-type", default="hf", metavar="hf", help="of a Hugging Face model that is loaded")
    made.add_argument(
        "--load-dir", required=True, help="a run (its newest checkpoint), RUN/checkpoints/STEP, or a model"
    )
    made.add_argument(
        "--save-dir", required=True, help="folder of the model, one there is replaced; or a new run folder"
    )
    return made


if __name__ == "__main__":
    run(main)
