"""`parallel`: how a model and a batch are laid out over processes."""

from pydantic.dataclasses import dataclass

from .fields import SECTION, Count


@dataclass(config=SECTION)
class Parallel:
    """Data parallelism takes the processes that are left: world size / (tensor * pipeline * context)."""

    tensor: Count = 1
    """Ranks that share every matrix."""
    pipeline: Count = 1
    """Ranks that share the layers."""
    virtual_pipeline: Count = 1
    """Stages of each pipeline rank (the interleaved schedule)."""
    context: Count = 1
    """Ranks that share every sequence."""
    sequence: bool = False
    """Tensor-parallel ranks share norms and residuals along the sequence."""
    distributed_optimizer: bool = False
    """Data-parallel ranks share the optimizer's state."""
