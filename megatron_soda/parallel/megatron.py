"""How the two supported versions of megatron-core differ: 0.16.1, the last for Python 3.11, and 0.19.2, from Python
3.12 on.

All other code only uses what both have in common. That is why training/checkpoint_files.py bypasses
`dist_checkpointing.save` and `load` (0.19.2 stores common.pt as a pickle among the tensors, and has no strategies for
it), why context parallelism cuts batches itself (`get_batch_on_this_cp_rank` has a different signature), and why
Transformer Engine's spec is modified after it is created (its function has different arguments).
"""

import logging
from functools import partial
from typing import Any

from megatron.core.optimizer import distrib_optimizer, optimizer


def adapt() -> None:
    """Makes both versions of megatron-core behave the same. Called once, by parallel/ranks.py."""
    # 0.19.2 also matches a checkpoint's parameter groups by learning rate, so a run with a changed rate, or a
    # checkpoint from 0.16.1, could not be resumed. Our groups differ only in their decay.
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = ("wd_mult",)  # type: ignore[attr-defined]
    # 0.19.2 warns in every process that GPTModel gets no new features, and that it lays out the distributed optimizer's
    # buffers itself. Users can change neither.
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def mlp_submodules(layer: Any) -> Any:
    """What the MLP of a layer's spec is made of. 0.16.1 has a spec for it, 0.19.2 a function with arguments."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
