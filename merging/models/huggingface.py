"""Hugging Face's llama and gemma 3 text models as ours: what a config.json says, and the layout of their parameters.

What we don't have (scaled rotary positions, biases, capped logits, other architectures) is refused by name, and so is a key
that is not known here: it might change what the model computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from merging.checkpoints.format import CheckpointError
from merging.checkpoints.layouts import Layout, Rule
from merging.checkpoints.safetensors_header import load_json, refuse, show
from merging.checkpoints.storage import put_file, small_file
from merging.models.config import Gemma3Config, LlamaConfig

# Every model has it, under this name there and that one here.
EMBEDDING, OWN_EMBEDDING = "model.embed_tokens.weight", "token_embedder/embedding"


def read_config(folder: epath.PathLike, **changes: Any) -> LlamaConfig | Gemma3Config:
    """The configuration of a folder's model; `changes` are fields that a checkpoint leaves open, such as `dtype`.

    Raises CheckpointError that names every key whose value we don't have.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: the model's sizes are read from it")
    return from_json(load_json(small_file(path), str(path)), where=str(path), **changes)


def from_json(
    values: Mapping[str, Any], *, where: str, **changes: Any
) -> LlamaConfig | Gemma3Config:
    """The configuration that the values of a config.json stand for; `where` names it in messages."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {show(family)}; there are {', '.join(_FAMILIES)}"
        )
    keys = _Keys(values)
    fields = _FAMILIES[family](keys) | changes
    refuse(where, keys.problems(), "this model can't be built: it would compute something else")
    config = LlamaConfig if family == "llama" else Gemma3Config
    try:
        return config(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def layout(config: LlamaConfig | Gemma3Config) -> Layout:
    """Hugging Face's names -> ours, scanned or not as the configuration says; its `inverse()` leads back."""
    layers, stack = ("layers", "layer ") if config.scan_layers else ("layers_{layer}", "")
    renamed = {
        "self_attn.q_proj": ("attention/query", "(heads kv) embed", "embed heads kv"),
        "self_attn.k_proj": ("attention/key", "(kv_heads kv) embed", "embed kv_heads kv"),
        "self_attn.v_proj": ("attention/value", "(kv_heads kv) embed", "embed kv_heads kv"),
        "self_attn.o_proj": ("attention/out", "embed (heads kv)", "heads kv embed"),
        "mlp.gate_proj": ("mlp/wi_0", "mlp embed", "embed mlp"),
        "mlp.up_proj": ("mlp/wi_1", "mlp embed", "embed mlp"),
        "mlp.down_proj": ("mlp/wo", "embed mlp", "mlp embed"),
    }
    norms = _GEMMA3_NORMS if isinstance(config, Gemma3Config) else _LLAMA_NORMS
    kernels = tuple(
        Rule(
            f"model.layers.{{layer}}.{theirs}.weight",
            f"{layers}/{ours}/kernel",
            f"{before} -> {stack}{after}",
        )
        for theirs, (ours, before, after) in renamed.items()
    )
    scales = tuple(
        Rule(
            f"model.layers.{{layer}}.{theirs}.weight",
            f"{layers}/{ours}/scale",
            f"width -> {stack}width",
        )
        for theirs, ours in norms.items()
    )
    single = (
        Rule(EMBEDDING, OWN_EMBEDDING),
        Rule("lm_head.weight", "token_embedder/readout"),
        Rule("model.norm.weight", "final_norm/scale"),
    )
    # What the model doesn't have passes as it is: who knows what is wanted tells it, with all else that differs.
    others = Rule("*", "*")
    return Layout(
        name="own",
        rules=(*single, *kernels, *scales, others),
        sizes={
            "layer": config.num_layers,
            "embed": config.embed_dim,
            "mlp": config.mlp_dim,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "kv": config.head_dim,
        },
    )


def to_json(config: LlamaConfig | Gemma3Config) -> dict[str, Any]:
    """The values of a config.json that `from_json` reads as this configuration, and `transformers` as this model.

    Tokens that begin, end and fill up texts are null: a configuration doesn't know them.
    """
    values = {
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": config.head_dim,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "torch_dtype": config.param_dtype,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, LlamaConfig):
        return values | {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "mlp_bias": False,
            "model_type": "llama",
            "tie_word_embeddings": config.tied_embeddings,
        }
    kinds = {"global": "full_attention", "local": "sliding_attention"}
    return values | {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [kinds[kind] for kind in config.layer_kinds],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _scalar(config.query_scale),
        "rope_local_base_freq": config.local_rope_base,
        "sliding_window": config.window,
        "tie_word_embeddings": True,
    }


def _scalar(query_scale: float) -> float:
    """The number whose inverse square root this is: a whole one, or one of those next to its inverse square, which is rounded."""
    near = query_scale**-2
    choices = (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((each for each in choices if each and each**-0.5 == query_scale), near)


def says(folder: epath.PathLike, config: LlamaConfig | Gemma3Config) -> bool:
    """Whether a folder's config.json is there and says this configuration, but for what checkpoints leave open."""
    if not (epath.Path(folder) / "config.json").exists():
        return False
    return read_config(folder, **{name: getattr(config, name) for name in _LEFT_OPEN}) == config


def write_config(folder: epath.PathLike, config: LlamaConfig | Gemma3Config) -> None:
    """Puts a config.json into a folder, in place of another."""
    text = json.dumps(to_json(config), indent=2) + "\n"
    put_file(epath.Path(folder) / "config.json", text.encode())


_LEFT_OPEN = ("dropout_rate", "dtype", "param_dtype", "scan_layers", "remat")
_LLAMA_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
_GEMMA3_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
}

# ---- config.json ---------------------------------------------------------------------------------------------------

# Keys that say nothing about what a forward pass computes: tokens, initialisation, training, files.
_UNREAD = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "model_type",
    "name_or_path",
    "pad_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
}


_MOST = 1 << 31
_MOST_LAYERS = 10_000  # each has an entry in `layer_types`


class _Keys:
    """The values of a config.json, read key by key: what is missing, unfit or left over is told at the end."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = {k: v for k, v in values.items() if k not in _UNREAD and k[:1] != "_"}
        self._problems: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null; one without a default must be there."""
        value = self._left.pop(key, None)
        if value is None and default is None:
            self._problems.append(f"{key} is missing")
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1 and not absurd."""
        value = self.take(key, default)
        is_count = type(value) is int and 1 <= value <= _MOST
        if value is not None and not is_count:
            self._problems.append(
                f"{key} is {show(value)}, wanted a whole number from 1 to {_MOST}"
            )
        return value if is_count else 1

    def count_if_there(self, key: str) -> int | None:
        """The same, None where it is absent or null."""
        if self._left.get(key) is None:
            return self._left.pop(key, None)
        return self.count(key)

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self._problems.append(f"{key} is {show(value)}, wanted a positive number")
            return default
        return float(value)

    def only(self, key: str, *wanted: Any) -> None:
        """Notes a problem unless the value is one of those that we compute; absent is the first of them."""
        value = self._left.pop(key, wanted[0])
        if not any(value == each and type(value) is type(each) for each in wanted):
            told = " or ".join(json.dumps(each) for each in wanted)
            self._problems.append(f"{key} is {show(value)}; we have {told}")

    def inside(self, key: str) -> _Keys | None:
        """A nested object, whose problems become ours; None where it is absent or null."""
        value = self._left.pop(key, None)
        if value is not None and not isinstance(value, Mapping):
            self._problems.append(f"{key} is {show(value)}, wanted an object")
            value = None
        return None if value is None else _Nested(value, key, self)

    def problem(self, text: str) -> None:
        """Notes one."""
        self._problems.append(text)

    def done(self) -> None:
        """What nobody took is not known here."""
        self._problems += [f"{k} is {show(v)}; this key is unknown" for k, v in self._left.items()]
        self._left = {}

    def problems(self) -> list[str]:
        self.done()
        return self._problems


class _Nested(_Keys):
    def __init__(self, values: Mapping[str, Any], key: str, parent: _Keys):
        super().__init__(values)
        self._key, self._parent = key, parent

    def done(self) -> None:
        super().done()
        self._parent._problems += [f"{self._key}: {problem}" for problem in self._problems]


def _common(keys: _Keys) -> dict[str, Any]:
    heads = keys.count("num_attention_heads")
    width = keys.count("hidden_size")
    keys.only("attention_bias", False)
    return {
        "vocab_size": keys.count("vocab_size"),
        "embed_dim": width,
        "num_layers": keys.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": keys.count("num_key_value_heads", heads),
        "head_dim": keys.count("head_dim", max(1, width // heads)),
        "mlp_dim": keys.count("intermediate_size"),
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "max_positions": keys.count_if_there("max_position_embeddings"),
    }


def _llama(keys: _Keys) -> dict[str, Any]:
    keys.only("hidden_act", "silu")
    keys.only("mlp_bias", False)
    keys.only("pretraining_tp", 1)
    keys.only("is_llama_config", True)
    keys.only("rope_interleaved", False)
    rope = keys.inside("rope_parameters")
    base = keys.number("rope_theta", 10_000.0)
    return _common(keys) | {
        "rope_base": _plain_rope(keys, "rope_scaling", base) if rope is None else _rope(rope, base),
        "tied_embeddings": bool(keys.take("tie_word_embeddings", False)),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("hidden_act", "gelu_pytorch_tanh")
    keys.only("tie_word_embeddings", True)
    keys.only("final_logit_softcapping", None)
    keys.only("attn_logit_softcapping", None)
    keys.only("use_bidirectional_attention", False, None)
    base = keys.number("rope_theta", 1_000_000.0)
    local_base = keys.number("rope_local_base_freq", 10_000.0)
    rope = keys.inside("rope_parameters")
    if rope is None:
        base = _plain_rope(keys, "rope_scaling", base)
    else:
        for key in ("full_attention", "sliding_attention"):
            kind = rope.inside(key)
            if kind is not None and key == "full_attention":
                base = _rope(kind, base)
            elif kind is not None:
                local_base = _rope(kind, local_base)
        rope.done()
    fields = _common(keys)
    return fields | {
        "rope_base": base,
        "local_rope_base": local_base,
        "query_scale": keys.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "window": keys.count("sliding_window", 4096),
        "layer_kinds": _layer_kinds(keys, fields["num_layers"]),
    }


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {"llama": _llama, "gemma3_text": _gemma3}


def _layer_kinds(keys: _Keys, num_layers: int) -> tuple[str, ...]:
    every = keys.count("sliding_window_pattern", 6)
    if num_layers > _MOST_LAYERS:
        keys.problem(f"num_hidden_layers is {num_layers}, wanted at most {_MOST_LAYERS}")
        return ()
    pattern = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)
    ]
    kinds = {"full_attention": "global", "sliding_attention": "local"}
    found = keys.take("layer_types", pattern)
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        keys.problem(f"layer_types is {show(found)}, wanted a list of names")
        return ()
    return tuple(kinds.get(kind, kind) for kind in found)


def _plain_rope(keys: _Keys, key: str, base: float) -> float:
    """The base, where the wavelengths aren't scaled."""
    keys.only(key, None)
    return base


def _rope(keys: _Keys, base: float) -> float:
    """The base that an entry of `rope_parameters` says, which must be of the plain type."""
    keys.only("rope_type", "default")
    base = keys.number("rope_theta", base)
    keys.done()
    return base
