"""The families of models by name: which configuration is whose."""

from __future__ import annotations

from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig, PalmConfig
from merging.models.decoder import Decoder
from merging.models.gated import Gemma3, Llama
from merging.models.palm import Palm

# By the name that a model.json gives.
FAMILIES: dict[str, tuple[type[DecoderConfig], type[Decoder]]] = {
    "palm": (PalmConfig, Palm),
    "llama": (LlamaConfig, Llama),
    "gemma3": (Gemma3Config, Gemma3),
}


def family_of(config: DecoderConfig) -> str:
    """The name of a configuration's family."""
    return next(name for name, (kind, _) in FAMILIES.items() if kind is type(config))


def is_prefix_lm(config: DecoderConfig) -> bool:
    """Whether prompts see themselves in both directions, as PaLM is trained here; Hugging Face's families are causal."""
    return family_of(config) == "palm"


def model_of(config: DecoderConfig) -> Decoder:
    """The model of a configuration."""
    return FAMILIES[family_of(config)][1](config)
