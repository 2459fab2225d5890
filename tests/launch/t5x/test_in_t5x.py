"""T5X's own model around our module gives what this system gives: texts, log-likelihoods, shardings; and one run of its programs."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.t5x.model import DecoderForT5X
from merging.models.config import named
from merging.models.decoding import generate
from merging.models.families import model_of
from merging.training import output
from tests.campaigns import t5x as campaigns
from tests.launch.t5x import programs

# T5X and what it imports warn of their own deprecations.
pytestmark = [pytest.mark.t5x, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("t5x")]

CONFIG = named(
    "mini_xs", vocab_size=32, embed_dim=8, num_layers=2, num_heads=4, head_dim=4, mlp_dim=16
)
INPUTS, TARGETS = 5, 4
EOS = 1


def t5x_model(config: Any) -> Any:
    import seqio
    from t5x import adafactor, decoding, models

    return models.DecoderOnlyModel(
        module=DecoderForT5X(config),
        vocabulary=seqio.PassThroughVocabulary(config.vocab_size, eos_id=EOS),
        optimizer_def=adafactor.Adafactor(
            logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
        decode_fn=decoding.temperature_sample,
        inputs_bidirectional_attention=True,
    )


def features() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """A batch as seqio's converter makes it for T5X, and the inputs [B, INPUTS] and their lengths."""
    rng = np.random.default_rng(0)
    lengths = np.array([0, 2, INPUTS])
    inputs = rng.integers(2, 32, (3, INPUTS), np.int32) * (np.arange(INPUTS) < lengths[:, None])
    targets = rng.integers(2, 32, (3, TARGETS), np.int32)
    targets[:, -1] = EOS
    whole = np.zeros((3, INPUTS + TARGETS), np.int32)
    for row, these, more, n in zip(whole, inputs, targets, lengths, strict=True):
        row[: n + TARGETS] = [*these[:n], *more]
    place = np.arange(INPUTS + TARGETS)
    return (
        {
            "decoder_target_tokens": whole,
            "decoder_input_tokens": np.pad(whole, ((0, 0), (1, 0)))[:, :-1],
            "decoder_loss_weights": ((place >= lengths[:, None]) & (whole > 0)).astype(np.int32),
            "decoder_causal_attention": (place <= lengths[:, None]).astype(np.int32),
        },
        inputs,
        lengths,
    )


def test_its_predictions_and_scores_are_ours():
    model = t5x_model(CONFIG)
    batch, inputs, lengths = features()
    shapes = {name: each.shape for name, each in batch.items()}
    variables = jax.jit(lambda key: model.get_initial_variables(key, shapes))(jax.random.key(0))
    # Sharper than new ones, whose likeliest tokens are near ties.
    params = jax.tree.map(lambda x: 3 * x, variables["params"])
    own = model_of(CONFIG)

    scores = jax.jit(model.score_batch)(params, batch)
    logits = own.apply(
        {"params": params},
        batch["decoder_input_tokens"],
        prefix_mask=batch["decoder_causal_attention"] > 0,
    )
    log_probs = jax.nn.log_softmax(logits)
    of_targets = jnp.take_along_axis(
        log_probs, batch["decoder_target_tokens"][:, :, None].astype(np.int32), axis=-1
    )
    expected = (of_targets[:, :, 0] * batch["decoder_loss_weights"]).sum(-1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)

    prompts = np.pad(inputs, ((0, 0), (1, 0)))  # from the start token on
    with jax.numpy_dtype_promotion("strict"):
        generated = generate(
            own,
            params,
            prompts,
            lengths + 1,
            max_new_tokens=TARGETS,
            eos_id=EOS,
            bidirectional=True,
        )
    # Two decodes of each prompt, for which T5X copies the cache's rows; the likeliest tokens give one text.
    texts, _ = model.predict_batch_with_aux(
        params,
        batch,
        num_decodes=2,
        return_all_decodes=True,
        decoder_params={"temperature": 0.0, "topk": 0, "max_decode_steps": TARGETS},
    )
    for decode in range(2):
        np.testing.assert_array_equal(texts[:, decode, :TARGETS], generated.tokens)


def test_its_partitioner_cuts_parameters_by_their_names():
    from jax.sharding import PartitionSpec
    from t5x import partitioning, utils

    model = t5x_model(CONFIG)
    partitioner = partitioning.PjitPartitioner(
        num_partitions=None,
        model_parallel_submesh=(1, 2, 1, 1),
        logical_axis_rules=partitioning.standard_logical_axis_rules(),
    )
    shapes = {"decoder_input_tokens": (8, 4), "decoder_target_tokens": (8, 4)}
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes=shapes,
        partitioner=partitioner,
    )
    assert dict(partitioner.mesh.shape) == {"data": 4, "model": 2}
    axes = initializer.train_state_axes.params
    assert axes["token_embedder"]["embedding"] == PartitionSpec("model", None)
    block = axes["layers"]
    assert block["attention"]["query"]["kernel"] == PartitionSpec(None, None, "model", None)
    assert block["attention"]["key"]["kernel"] == PartitionSpec(None, None, None)
    assert block["mlp"]["wo"]["kernel"] == PartitionSpec(None, "model", None)


@pytest.mark.slow
def test_its_programs_train_and_evaluate_what_we_write(tmp_path: pathlib.Path):
    """Parameters of ours -> t5x.train, two steps -> t5x.eval and launch.evaluate of its checkpoint."""
    config = named("mini_xs")
    params = jax.jit(model_of(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    base = tmp_path / "base"
    base.mkdir()
    output.write(base, nn.unbox(params["params"]), config, None)
    start = tmp_path / "start" / "checkpoint_0"
    programs.own(
        "convert",
        f"--input={base}",
        "--format=t5x",
        f"--output={start}",
        log=tmp_path / "convert.log",
    )

    task, lengths = "answers_right_mini", {"inputs": 64, "targets": 8}
    programs.run(
        "t5x.train",
        [f"{programs.CONFIGS}/finetune.gin"],
        {
            "MODEL_DIR": str(tmp_path / "expert"),
            "INITIAL_CHECKPOINT_PATH": str(start),
            "MIXTURE_OR_TASK_NAME": task,
            "TASK_FEATURE_LENGTHS": lengths,
            "TRAIN_STEPS": 2,
            "BATCH_SIZE": 8,
            "train.infer_eval_dataset_cfg": None,
            "train.train_eval_dataset_cfg": None,
            **programs.TWO_ALONG_MODEL,
        },
        log=tmp_path / "train.log",
    )
    expert = tmp_path / "expert" / "checkpoint_2"
    programs.run(
        "t5x.eval",
        [f"{programs.CONFIGS}/eval.gin"],
        {
            "CHECKPOINT_PATH": str(expert),
            "EVAL_OUTPUT_DIR": str(tmp_path / "theirs"),
            "MIXTURE_OR_TASK_NAME": f"{task}_rank",
            "TASK_FEATURE_LENGTHS": lengths,
            **programs.TWO_ALONG_MODEL,
        },
        log=tmp_path / "eval.log",
    )
    programs.own(
        "evaluate",
        "--gin_file=gin_configs/runs/evaluate.gin",
        "--gin_file=gin_configs/models/mini_xs.gin",
        f"--checkpoint={expert}",
        f"--tasks={task}",
        f"--output={tmp_path / 'ours'}",
        f"--gin.TASK_FEATURE_LENGTHS={lengths}",
        "--gin.WRITE_EXAMPLES=True",
        log=tmp_path / "evaluate.log",
    )
    found = programs.compared(tmp_path / "theirs", tmp_path / "ours", "checkpoint_2")
    assert found.choices > 100
    assert found.is_good, found


@pytest.mark.slow
def test_merges_of_its_scanned_model_are_evaluated_and_trained_on(tmp_path: pathlib.Path):
    """The campaign's part, two steps a run: t5x.train, an expert of either flavour -> launch.merge -> t5x.eval and t5x.train."""
    campaign = campaigns.Campaign(tmp_path, steps=2)
    campaigns.of_t5x(campaign, "scalable_t5", ("plays_liked_mini", "answers_right_mini"))
    assert campaign.is_good
