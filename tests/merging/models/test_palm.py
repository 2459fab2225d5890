"""PaLM is what the paper says: against a plain float64 transcription, and as it starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.models import decoder
from merging.models.config import named
from merging.models.palm import Palm
from tests.merging.models import families
from tests.oracle import palm as oracle


@pytest.mark.parametrize("prefix", [0, 5])
def test_logits_are_the_papers(prefix: int):
    model = families.build("palm")
    params = families.params_of(model)
    tokens = families.tokens_of(model, (1, 11))
    prefix_mask = (np.arange(11) < prefix)[None] if prefix else None
    found = model.apply({"params": params}, tokens, prefix_mask=prefix_mask)
    wanted = oracle.logits(families.unstacked(params), tokens[0], prefix=prefix)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], wanted, rtol=2e-5, atol=2e-5)


def test_it_starts_as_the_paper_says():
    """Kernels N(0, 1 / sqrt(n_in)), embeddings N(0, 1), scales 1; each layer drawn for itself."""
    model = Palm(named("mini_s", scan_layers=True))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.device_get(decoder.nn.unbox(params)["params"])
    layers, c = params["layers"], model.config
    inputs = {
        ("attention", "query"): c.embed_dim,
        ("attention", "key"): c.embed_dim,
        ("attention", "value"): c.embed_dim,
        ("attention", "out"): c.num_heads * c.head_dim,
        ("mlp", "wi_0"): c.embed_dim,
        ("mlp", "wi_1"): c.embed_dim,
        ("mlp", "wo"): c.mlp_dim,
    }
    for (part, name), count in inputs.items():
        kernel = layers[part][name]["kernel"]
        for layer in kernel:
            within = 5 / np.sqrt(2 * layer.size)  # standard errors of a standard deviation
            assert layer.std() * np.sqrt(count) == pytest.approx(1, abs=within), name
            assert np.abs(layer).max() * np.sqrt(count) > 2.5, name  # not truncated at 2
        assert np.abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.1
    assert params["token_embedder"]["embedding"].std() == pytest.approx(1, abs=0.02)
    assert (layers["norm"]["scale"] == 1).all() and (params["final_norm"]["scale"] == 1).all()


def test_logits_start_with_a_deviation_of_one():
    model = Palm(named("mini_s"))
    params = decoder.nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    logits = model.apply(params, families.tokens_of(model, (2, 16)))
    assert float(logits.std()) == pytest.approx(1, abs=0.1)
