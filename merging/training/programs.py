"""A model's programs traced from shapes: train step, scoring, prefill and decoding step, sharded over a mesh.

Nothing is allocated, so that a program of a pod can be compiled on a laptop (`engine.compiled.figures`) before there is a
pod. They are the very functions that the stages run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from merging import partitioning
from merging.engine.programs import Program
from merging.evaluation.score import Choices, score
from merging.models.decoder import Cache, Decoder, boxed_params
from merging.training.batch import Batch
from merging.training.optimizer import WeightAveraging
from merging.training.trainer import Recipe, Trainer

PROGRAMS = ("train", "score", "prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How much one call of each program does.

    Attributes:
      rows, length: of a batch that is trained on or scored, in rows and tokens a row.
      prompts, prompt_length, new_tokens: of decoding, whose cache has room for both; a scored row has new_tokens targets.
      microbatches, vocabulary_chunks, clip_norm, frozen: see `training.step.train_step`; scoring has the same chunks.
      averaging: of weights, in training; None: none.
    """

    rows: int
    length: int
    prompts: int
    prompt_length: int
    new_tokens: int
    microbatches: int = 1
    vocabulary_chunks: int = 1
    clip_norm: float | None = 1.0
    frozen: tuple[str, ...] = ()
    averaging: WeightAveraging | None = None


def model_programs(
    model: Decoder,
    mesh: Mesh,
    work: Work,
    *,
    optimizer: optax.GradientTransformation,
    only: Sequence[str] = PROGRAMS,
) -> Iterator[Program]:
    """The train step with parameters as the model has them; the others with parameters in the activations' dtype."""
    served = model.clone(
        config=dataclasses.replace(model.config, param_dtype=model.config.dtype, remat="none")
    )
    makers = {
        "train": functools.partial(_train, model, mesh, work, optimizer),
        "score": functools.partial(_score, served, mesh, work),
        "prefill": functools.partial(_prefill, served, mesh, work),
        "decode": functools.partial(_decode, served, mesh, work),
    }
    for name in PROGRAMS:
        if name in only:
            yield makers[name]()


def placed_params(model: Decoder, mesh: Mesh) -> Any:
    """The model's parameters as ShapeDtypeStructs with their shardings."""
    return _placed(boxed_params(model), mesh)


def _train(
    model: Decoder, mesh: Mesh, work: Work, optimizer: optax.GradientTransformation
) -> Program:
    """The step of the finetune stage's own `Trainer`, for one expert."""
    recipe = Recipe(
        config=model.config,
        mesh=mesh,
        optimizer=lambda rate: optimizer,  # which has its rate already
        learning_rate=0.0,
        z_loss=getattr(model.config, "z_loss", 0.0),
        clip_norm=work.clip_norm,
        microbatches=work.microbatches,
        vocabulary_chunks=work.vocabulary_chunks,
        averaging=work.averaging,
        frozen=work.frozen,
        experts=None,
    )
    trainer = Trainer(recipe)
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh))
    arguments = trainer.abstract_state, _rows(_batch(work), mesh), seed
    return _program("train", mesh, trainer.step, arguments, tokens=work.rows * work.length)


def _score(model: Decoder, mesh: Mesh, work: Work) -> Program:
    step = functools.partial(score, model, vocabulary_chunks=work.vocabulary_chunks)
    tokens = jax.ShapeDtypeStruct((work.rows, work.length), jnp.int32)
    targets = jax.ShapeDtypeStruct((work.rows, work.new_tokens), jnp.int32)
    rows = Choices(tokens, tokens, tokens, reads=targets, targets=targets)
    arguments = placed_params(model, mesh), _rows(rows, mesh)
    return _program("score", mesh, jax.jit(step), arguments, tokens=work.rows * work.length)


def _prefill(model: Decoder, mesh: Mesh, work: Work) -> Program:
    def prefill(params: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
        """The prompts' likeliest next tokens and the cache that holds them."""
        room = work.prompt_length + work.new_tokens
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens, lengths, room, method="prefill")
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return _likeliest(model, variables, last), cache

    tokens = jax.ShapeDtypeStruct((work.prompts, work.prompt_length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((work.prompts,), jnp.int32)
    rows = _rows((tokens, lengths), mesh)
    cache = partitioning.cache_shardings(_cache(model, work), mesh)
    jitted = jax.jit(prefill, out_shardings=(_shardings(rows[1]), cache))
    arguments = placed_params(model, mesh), *rows
    return _program("prefill", mesh, jitted, arguments, tokens=work.prompts * work.prompt_length)


def _decode(model: Decoder, mesh: Mesh, work: Work) -> Program:
    def decode(params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token more for each row."""
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens[:, None], cache, method="extend")
        return _likeliest(model, variables, hidden[:, 0]), cache

    tokens = _rows(jax.ShapeDtypeStruct((work.prompts,), jnp.int32), mesh)
    cache = _cache(model, work)
    cache = _with_shardings(cache, partitioning.cache_shardings(cache, mesh))
    jitted = jax.jit(decode, out_shardings=(tokens.sharding, _shardings(cache)), donate_argnums=2)
    arguments = placed_params(model, mesh), tokens, cache
    return _program("decode", mesh, jitted, arguments, tokens=work.prompts)


def _likeliest(model: Decoder, variables: Any, hidden: jax.Array) -> jax.Array:
    logits = model.apply(variables, hidden, method="readout")
    logits = nn.with_logical_constraint(logits, ("batch", "vocab"))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _program(
    name: str, mesh: Mesh, jitted: Any, arguments: tuple[Any, ...], *, tokens: int
) -> Program:
    def lower() -> jax.stages.Lowered:
        with partitioning.use(mesh):
            return jitted.lower(*arguments)

    return Program(name=name, lower=lower, arguments=arguments, tokens=tokens)


# ---- shapes and shardings -----------------------------------------------------------------------------------------


def _batch(work: Work) -> Batch:
    """Packed sequences of inputs and targets, as `feed.Placement` gives them."""
    integers, floats, flags = (
        jax.ShapeDtypeStruct((work.rows, work.length), dtype)
        for dtype in (jnp.int32, jnp.float32, jnp.bool_)
    )
    return Batch(
        integers, integers, floats, segment_ids=integers, positions=integers, prefix_mask=flags
    )


def _cache(model: Decoder, work: Work) -> Cache:
    tokens = jnp.zeros((work.prompts, 1), jnp.int32)
    room = work.prompt_length + work.new_tokens

    def prefill(params: Any) -> Cache:
        lengths = jnp.ones((work.prompts,), jnp.int32)
        return model.apply({"params": params}, tokens, lengths, room, method="prefill")[1]

    return jax.eval_shape(prefill, nn.unbox(boxed_params(model)))


def _placed(boxed: Any, mesh: Mesh) -> Any:
    return _with_shardings(nn.unbox(boxed), partitioning.shardings(boxed, mesh))


def _rows(tree: Any, mesh: Mesh) -> Any:
    return _with_shardings(tree, partitioning.batch_shardings(tree, mesh))


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
