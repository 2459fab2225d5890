"""Decoder-only transformers in flax.linen: PaLM (`palm.py`), and llama and gemma 3 (`gated.py`)."""
