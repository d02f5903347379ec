"""`soda generate`."""

import time
from pathlib import Path

from ..config import Recipe
from ..files import read_json
from ..hf.load import load_model
from ..run_folder import record_timing
from .tasks import generate as run_tasks
from .tasks import held_out_rows


def generate(recipe: Recipe, folder: Path) -> list[dict]:
    """Runs the recipe's tasks on the exported model in `folder`; RUN/samples gets the wav files and samples.json."""
    from ..codecs.description import load_data_codec

    began = time.monotonic()
    model = load_model(folder)
    rows = held_out_rows(recipe.data_folder, recipe.generate.split, model, recipe.data.accept)
    out = Path(recipe.run) / "samples"
    samples = run_tasks(model, recipe, rows, load_data_codec(folder), out)
    record_timing(Path(recipe.run), "generate", {"seconds": time.monotonic() - began})
    for sample in read_json(out / "samples.json"):
        text = f": {sample['output_text']!r}" if sample["output_text"] is not None else ""
        print(f"{sample['task']:<11}{sample['id']:<28}{sample['note']}{text}")
    print(f"{sum(len(s['audio']) for s in samples)} wav files in {out}")
    return samples
