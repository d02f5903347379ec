"""Where the two versions of megatron-core differ: 0.16.1, the last one for Python 3.11, and 0.19.2 from Python 3.12 on.

Everything else calls only what both have, in the same way. That is why training/checkpoint_files.py goes around
`dist_checkpointing.save` and `load` (0.19.2 keeps common.pt as a pickle among the tensors, and has no strategies for
it), why context parallelism cuts batches itself (`get_batch_on_this_cp_rank` has another signature), and why
Transformer Engine's spec is changed after it was made (its function has other arguments).
"""

import logging
from functools import partial
from typing import Any

from megatron.core.optimizer import distrib_optimizer, optimizer


def adapt() -> None:
    """Makes megatron-core behave alike in both versions. Called once, by parallel/ranks.py."""
    # 0.19.2 finds a parameter group in a checkpoint by its learning rate, too, so a run whose rate was changed, or a
    # checkpoint of 0.16.1, could not be resumed. Ours differ in their decay alone.
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = ("wd_mult",)  # type: ignore[attr-defined]
    # 0.19.2 says once a process that GPTModel gets no new features, and that it lays out the distributed optimizer's
    # buffers itself. Neither is the user's to change.
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def mlp_submodules(layer: Any) -> Any:
    """What the MLP of a layer's spec is made of. 0.16.1 has a spec for it, 0.19.2 a function with arguments."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
