"""Gives a checkpoint that an older version wrote the index that is read now. It unpickles: only for folders you trust.

python tools/index_checkpoint.py runs/mine/checkpoints/step_00000900
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from megatron_soda.errors import SodaError, run_tool
from megatron_soda.files import write_json
from megatron_soda.parallel import ranks  # noqa: F401  before anything of megatron-core


def index_checkpoint(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint, step_... of a run's checkpoints/. Its pickles are run.")
    ],
) -> None:
    """Write index.json beside .metadata and common.pt, and a new manifest."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from megatron_soda.training.checkpoint import manifest_of
    from megatron_soda.training.checkpoint_index import write_index

    if not (folder / ".metadata").is_file():
        raise SodaError(f"{folder}: has no .metadata; this is no torch_dist checkpoint")
    metadata = FileSystemReader(folder).read_metadata()
    write_index(folder, metadata, torch.load(folder / "common.pt", weights_only=False))
    write_json(folder / "manifest.json", manifest_of(folder))
    print(f"{folder}: {len(metadata.state_dict_metadata)} tensors indexed")


if __name__ == "__main__":
    run_tool(index_checkpoint)
