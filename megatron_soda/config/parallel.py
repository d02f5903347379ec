"""`parallel`: how the model and the batch are distributed over processes."""

from typing import Annotated

from pydantic.dataclasses import dataclass

from .fields import SECTION, Count, OrNone


@dataclass(config=SECTION)
class Parallel:
    """Data parallelism uses the remaining processes: world size / (tensor * pipeline * context)."""

    tensor: Count = 1
    """Ranks that each matrix is split over."""
    pipeline: Count = 1
    """Ranks that the layers are split over."""
    virtual_pipeline: Count = 1
    """Stages per pipeline rank (interleaved schedule)."""
    context: Count = 1
    """Ranks that each sequence is split over."""
    sequence: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks."""
    overlap_gradients: Annotated[bool | None, OrNone] = None
    """Sum gradients over data-parallel ranks during the backward pass. Empty: on CUDA, if there is no pipeline."""
    overlap_parameters: Annotated[bool | None, OrNone] = None
    """With distributed_optimizer, gather updated parameters during the forward pass. Empty: where gradients overlap on
    CUDA."""
    overlap_tensor: Annotated[bool | None, OrNone] = None
    """With tensor and sequence, exchange activations during Transformer Engine's matrix products. Empty: no."""
