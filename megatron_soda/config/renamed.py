"""Keys of version 0.1 that have been renamed. They still load, with a line that gives the new name."""

RENAMED = {
    "training.optimizer": "optimizer.name",
    **{
        f"training.{name}": f"optimizer.{name}"
        for name in ("cautious_mask", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "clip_grad")
    },
    "training.schedule": "schedule.name",
    **{f"training.{name}": f"schedule.{name}" for name in ("warmup_share", "decay_share")},
    "training.precision": "precision.dtype",
    **{f"training.{name}": f"precision.{name}" for name in ("fp8_recipe", "bf16_layers")},
    **{f"training.{name}": f"checkpoint.{name}" for name in ("save_every", "async_save", "keep_last", "keep_every")},
    **{f"training.{name}": f"logging.{name}" for name in ("log_every", "peak_tflops", "wandb_project")},
}
