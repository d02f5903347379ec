"""megatron_soda: native discrete audio models (SODA) on megatron-core."""

__version__ = "0.1.0"
