"""Hugging Face's config.json and names: what is read, what is refused, and the way there and back, bit by bit."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest

from merging.checkpoints.format import CheckpointError
from merging.checkpoints.layout_reader import arranged
from merging.models import huggingface
from merging.models.config import DecoderConfig
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import MeshShape
from tests.merging.models import families

ONE_DEVICE = MeshShape().mesh(jax.devices()[:1])

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20_000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 48,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def test_the_positions_that_a_model_has_learnt_are_known():
    assert config_of(LLAMA).max_positions == 128
    assert config_of(LLAMA | {"max_position_embeddings": None}).max_positions is None
    assert config_of(GEMMA3).max_positions is None
    with pytest.raises(
        CheckpointError, match="max_position_embeddings is 0, wanted a whole number"
    ):
        config_of(LLAMA | {"max_position_embeddings": 0})


def config_of(values: dict[str, Any], **changes: Any) -> DecoderConfig:
    return huggingface.from_json(values, where="config.json", **changes)


# ---- config.json -------------------------------------------------------------------------------------------------


def test_llama_is_read():
    config = config_of(LLAMA, dtype="bfloat16")
    assert (config.head_dim, config.num_kv_heads, config.mlp_dim) == (8, 2, 48)
    assert (config.rope_base, config.norm_epsilon) == (20_000.0, 1e-5)
    assert not config.tied_embeddings
    assert config.dtype == "bfloat16"
    assert config_of(LLAMA | {"tie_word_embeddings": True}).tied_embeddings


def test_what_is_left_out_is_what_hugging_face_takes():
    few = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta")}
    config = config_of(few)
    assert (config.num_kv_heads, config.rope_base) == (4, 10_000.0)
    few = {k: v for k, v in GEMMA3.items() if k not in ("layer_types", "query_pre_attn_scalar")}
    config = config_of(few | {"num_hidden_layers": 7})
    assert config.layer_kinds == ("local",) * 5 + ("global", "local")
    assert (config.query_scale, config.rope_base, config.local_rope_base) == (1 / 16, 1e6, 1e4)


def test_gemma3_is_read():
    config = config_of(GEMMA3 | {"rope_local_base_freq": 5_000.0, "rope_theta": 2e6})
    assert config.layer_kinds == ("local", "global", "local", "global")
    assert (config.window, config.query_scale) == (4, 0.25)
    assert (config.rope_base, config.local_rope_base) == (2e6, 5_000.0)


def test_rotary_positions_are_read_as_newer_files_have_them():
    newer = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 3e4}
    assert config_of(newer | {"rope_parameters": rope}).rope_base == 3e4
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 4e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = config_of(GEMMA3 | {"rope_parameters": rope})
    assert (config.rope_base, config.local_rope_base) == (4e6, 2e4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (LLAMA | {"model_type": "mamba"}, "model_type is 'mamba'; there are llama, gemma3_text"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True; we have false"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True; we have false"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act is 'relu'; we have \"silu\""),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved is True; we have false"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling is"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters: rope_type is 'yarn'",
        ),
        (
            LLAMA | {"rope_parameters": {"factor": 8.0}},
            "rope_parameters: factor is 8.0; this key is",
        ),
        (LLAMA | {"num_experts": 8}, "num_experts is 8; this key is unknown"),
        (LLAMA | {"vocab_size": 0}, "vocab_size is 0, wanted a whole number"),
        (LLAMA | {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', wanted a positive number"),
        (LLAMA | {"num_key_value_heads": 3}, "num_kv_heads is 3: it must be a divisor"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size is missing"),
        (
            GEMMA3 | {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0; we have null",
        ),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; we have null"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3 | {"tie_word_embeddings": False}, "tie_word_embeddings is False; we have true"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 4}, "layer_kinds is"),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}},
            "rope_parameters: full_attention: rope_type is 'linear'",
        ),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(values: dict[str, Any], told: str):
    with pytest.raises(CheckpointError) as error:
        config_of(values)
    assert told in str(error.value) and "config.json" in str(error.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(CheckpointError) as error:
        config_of(LLAMA | {"mlp_bias": True, "attention_bias": True, "hidden_act": "relu"})
    assert all(key in str(error.value) for key in ("mlp_bias", "attention_bias", "hidden_act"))


def test_a_folder_without_a_config_is_told(tmp_path: pathlib.Path):
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        huggingface.read_config(tmp_path)


# ---- names and bits ----------------------------------------------------------------------------------------------


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(leaf)
        for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
    }


def same_bits(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert found[name].dtype == leaf.dtype and found[name].shape == leaf.shape, name
        assert found[name].tobytes() == leaf.tobytes(), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_import_keep_every_bit(family: str, scan_layers: bool, dtype: str):
    model = families.build(family, scan_layers=scan_layers, param_dtype=dtype)
    ours = flat(families.params_of(model))
    layout = huggingface.layout(model.config)
    theirs = arranged(layout.inverse(), ours)
    assert all(name.startswith(("model.", "lm_head.")) for name in theirs)
    same_bits(arranged(layout, theirs), ours)
    same_bits(arranged(layout.inverse(), arranged(layout, theirs)), theirs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "changes", [{}, {"vocab_size": 41, "norm_epsilon": 1e-5, "rope_base": 5e5}]
)
def test_a_configuration_as_a_config_json_is_read_as_itself(family: str, changes: dict[str, Any]):
    config = families.build(family, **changes).config
    values = json.loads(json.dumps(huggingface.to_json(config)))
    assert config_of(values) == config


def test_the_numbers_of_a_config_json_come_back():
    for scalar in (1, 3, 168, 256):
        values = GEMMA3 | {"query_pre_attn_scalar": scalar}
        assert huggingface.to_json(config_of(values))["query_pre_attn_scalar"] == scalar
    for values in (LLAMA, LLAMA | {"tie_word_embeddings": True}, GEMMA3):
        found = huggingface.to_json(config_of(values, param_dtype="bfloat16"))
        left = {"architectures", "bos_token_id", "eos_token_id", "max_position_embeddings"}
        assert {k: found[k] for k in values.keys() - left} == {
            k: values[k] for k in values.keys() - left
        }


def test_scanned_and_unrolled_read_the_same_numbers():
    scanned = families.build("gemma3")
    unrolled = families.build("gemma3", scan_layers=False)
    params = families.params_of(scanned)
    theirs = arranged(huggingface.layout(scanned.config).inverse(), flat(params))
    found = arranged(huggingface.layout(unrolled.config), theirs)
    same_bits(found, flat(families.unstacked(params)))


def saved(folder: pathlib.Path, values: dict[str, Any], leaves: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps(values))
    save_file({k: np.ascontiguousarray(v) for k, v in leaves.items()}, folder / "model.safetensors")


def leaves_of(config: DecoderConfig) -> dict[str, np.ndarray]:
    ours = flat(families.params_of(model_of(config)))
    return {
        name: leaf.astype(ml_dtypes.bfloat16)
        for name, leaf in arranged(huggingface.layout(config).inverse(), ours).items()
    }


def test_a_folder_is_read_in_the_dtype_that_is_wanted(tmp_path: pathlib.Path):
    leaves = leaves_of(config_of(LLAMA))
    saved(tmp_path, LLAMA, leaves)
    for dtype in ("float32", "bfloat16"):
        config = huggingface.read_config(tmp_path, param_dtype=dtype)
        params = flat(read_params(tmp_path, config, ONE_DEVICE))
        wanted = arranged(huggingface.layout(config), leaves)
        same_bits(params, {k: v.astype(config.parameter_dtype) for k, v in wanted.items()})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.norm.weight": None}, "'final_norm/scale' is missing"),
        ({"lm_head.weight": None}, "'token_embedder/readout' is missing"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight"),
        ({"model.norm.bias": (32,)}, "'model.norm.bias' is [32], wanted none"),
        ({"model.norm.weight": (31,)}, "'final_norm/scale' is [31], wanted [32]"),
        ({"model.layers.0.self_attn.k_proj.weight": (32, 32)}, "k_proj.weight"),
    ],
)
def test_leaves_that_are_not_the_models_are_told(
    tmp_path: pathlib.Path, change: dict[str, Any], told: str
):
    leaves = leaves_of(config_of(LLAMA))
    for name, shape in change.items():
        leaves.pop(name, None)
        if shape is not None:
            leaves[name] = np.zeros(shape, np.float32)
    saved(tmp_path, LLAMA, leaves)
    with pytest.raises(CheckpointError) as error:
        read_params(tmp_path, huggingface.read_config(tmp_path), ONE_DEVICE)
    assert told in str(error.value)
