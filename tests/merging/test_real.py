"""Real models: perturbed copies of SmolLM2-135M-Instruct and gemma-3-270m, merged by every method, open in `transformers`
as they are and generate."""

from __future__ import annotations

import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

import merging
from tests import models

pytestmark = [pytest.mark.real, pytest.mark.peers, pytest.mark.slow]

EXPERTS = 2


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_merged_real_models_generate(
    real_checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str
):
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
    source = real_checkpoints / name
    if not source.is_dir():
        pytest.skip(f"no real checkpoint {source}: ./tests/run.sh makes it")
    experts = [_perturbed(source, tmp_path / f"expert_{i}", seed=i) for i in range(EXPERTS)]
    methods = {name: method() for name, method in merging.METHODS.items()}
    merging.merge_checkpoints(
        base=source, experts=experts, output_dir=tmp_path / "out", methods=methods, statistics=0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/ties")
    prompt = tokenizer("One, two, three, four, five,")["input_ids"]
    if (
        name == "gemma3"
    ):  # gemma was trained with a first token that this tokenizer.json does not add
        prompt = [2, *prompt]
    prompt = torch.tensor([prompt])
    for merge in methods:
        folder = tmp_path / "out" / merge
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
        problems = {k: v for k, v in loading.items() if v and k != "conversion_errors"}
        assert not problems, (merge, problems)
        with torch.no_grad():
            tokens = model.generate(
                prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
            )
        text = tokenizer.decode(tokens[0, prompt.shape[1] :])
        # A perturbation of 1 % of each weight leaves what the model knows.
        assert "six" in text, (merge, text)


def _perturbed(source: pathlib.Path, folder: pathlib.Path, *, seed: int) -> str:
    """A copy with each weight changed by about 1 %."""
    rng = np.random.default_rng(seed)
    shutil.copytree(source, folder)
    changed = {}
    for leaf, value in models.load(source).items():
        noise = rng.standard_normal(value.shape, dtype=np.float32) * np.float32(0.01)
        changed[leaf] = (value.astype(np.float32) * (1 + noise)).astype(ml_dtypes.bfloat16)
    from safetensors.numpy import save_file

    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
