"""megatron_soda: native discrete audio models (SODA) on megatron-core."""

import sys

__version__ = "0.1.0"

if sys.platform != "linux":
    raise ImportError(
        f"megatron_soda runs only on Linux, and this is {sys.platform}. A container or a virtual machine will do."
    )
