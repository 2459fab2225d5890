"""Our models and tasks under T5X. Nothing here imports T5X; its own programs import this, by gin_configs/t5x/."""
