"""Hugging Face's files as the output of a run: a tiny llama in, a tiny llama out, the same numbers as in our own format."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merging import finetune, manifest
from merging.checkpoints import open_checkpoint
from merging.models import model_file
from merging.models.config import LlamaConfig
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import MeshShape
from tests.merging.checkpoints.trees_common import read_all
from tests.merging.training import runs

pytestmark = pytest.mark.usefixtures("optax_promotes")

E, M, HEADS, KV, D = 16, 24, 4, 2, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": runs.V,
    "hidden_size": E,
    "intermediate_size": M,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": D,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
LAYER = {
    "input_layernorm": (E,),
    "post_attention_layernorm": (E,),
    "self_attn.q_proj": (HEADS * D, E),
    "self_attn.k_proj": (KV * D, E),
    "self_attn.v_proj": (KV * D, E),
    "self_attn.o_proj": (E, HEADS * D),
    "mlp.gate_proj": (M, E),
    "mlp.up_proj": (M, E),
    "mlp.down_proj": (E, M),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder as transformers writes it, with the file of a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    shapes = {
        "model.embed_tokens.weight": (runs.V, E),
        "model.norm.weight": (E,),
        **{f"model.layers.{i}.{k}.weight": shape for i in (0, 1) for k, shape in LAYER.items()},
    }
    rng = np.random.default_rng(0)
    leaves = {k: rng.normal(0, 0.2, shape).astype(np.float32) for k, shape in shapes.items()}
    save_file(leaves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    return folder


@pytest.fixture(scope="module")
def outputs(
    base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """One run in either format."""
    folder = tmp_path_factory.mktemp("outputs")
    for name in ("orbax", "safetensors"):
        runs.run(
            folder / name, model=None, initial_checkpoint_path=base, format=name, train_steps=2
        )
    return {name: folder / name for name in ("orbax", "safetensors")}


@pytest.mark.slow
def test_safetensors_have_the_bases_names_and_the_runs_numbers(
    base: pathlib.Path, outputs: dict[str, pathlib.Path]
):
    out = outputs["safetensors"]
    names = ("config.json", "manifest.json", "metrics.jsonl", "model.safetensors", "tokenizer.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert manifest.read(out)["inputs"]["base"]["path"] == str(base)
    begun, found = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in begun.items()
    }
    assert not any(np.array_equal(found[name], begun[name]) for name in begun)
    ours = read_all(open_checkpoint(outputs["orbax"]))
    gates = [found[f"model.layers.{i}.mlp.gate_proj.weight"].T for i in (0, 1)]
    assert np.array_equal(ours["layers/mlp/wi_0/kernel"], gates)
    config = model_file.describe(out).config
    assert config == model_file.describe(base).config
    mesh = MeshShape().mesh(jax.devices()[:1])
    one, two = (read_params(outputs[name], config, mesh) for name in outputs)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.peers
def test_transformers_opens_them(outputs: dict[str, pathlib.Path]):
    transformers = pytest.importorskip("transformers", reason="extra peers")
    import torch

    tokens = np.random.default_rng(1).integers(2, runs.V, (2, 9))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(outputs["safetensors"])
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    config = model_file.read(outputs["orbax"]).config
    mesh = MeshShape().mesh(jax.devices()[:1])
    params = read_params(outputs["orbax"], config, mesh)
    found = jax.jit(model_of(config).apply)({"params": params}, tokens.astype(np.int32))
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-5)


def test_safetensors_without_a_config_to_go_along_are_refused(tmp_path: pathlib.Path):
    """Nobody could open them."""
    config = LlamaConfig(
        vocab_size=runs.V,
        embed_dim=E,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_dim=M,
    )
    settings = runs.settings(tmp_path / "out", model=config, format="safetensors")
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH, which is None"):
        finetune.plan(settings, [runs.mixture()])
    (tmp_path / "ours").mkdir()
    settings = dataclasses.replace(settings, initial_checkpoint_path=tmp_path / "ours")
    with pytest.raises(ValueError, match=r"which has none \(.*ours"):
        finetune.plan(settings, [runs.mixture()])
