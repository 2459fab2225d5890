"""What a run will do, from settings and headers alone; everything that can be refused is refused here.

The identity of a run is all that its result depends on, as JSON: an output made by the same one is done, a state on disk of the same one is
gone on from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from merging import manifest, partitioning
from merging.models import model_file
from merging.models.config import DecoderConfig, PalmConfig
from merging.models.decoder import abstract_params, boxed_params
from merging.models.families import model_of
from merging.paths import is_like, of_leaves
from merging.training import initial as starts
from merging.training.feed import Placement
from merging.training.settings import Mixture, Optimizer, Settings
from merging.training.validation import Validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do; all that can be refused without a step has been.

    Attributes:
      mixtures: by the name of the output's folder below `output`; "" for the output itself.
      config: of the model in this run.
      validation: tasks that the run is validated by beside its loss; None: none.
      mesh: of devices.
      vocabulary: that goes along with the parameters.
      initial_digest: of the checkpoint.
      is_done: the output is there, made by these settings.
    """

    settings: Settings
    mixtures: Mapping[str, Mixture]
    output: epath.Path
    validation: Validation | None
    config: DecoderConfig
    mesh: jax.sharding.Mesh
    vocabulary: model_file.Vocabulary | None
    initial_digest: str | None
    identity: Mapping[str, Any]
    is_done: bool

    @property
    def outputs(self) -> dict[str, epath.Path]:
        """The folder of each expert."""
        return {name: self.output / name if name else self.output for name in self.mixtures}

    @property
    def groups(self) -> list[list[str]]:
        """The experts of each step."""
        names, size = list(self.mixtures), self.settings.experts_at_once
        return [names[i : i + size] for i in range(0, len(names), size)]

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        s = self.settings
        first = next(iter(self.mixtures.values()))
        tokens = s.batch_size * first.length
        at_once = f", {s.experts_at_once} at once" if s.experts_at_once > 1 else ""
        lines = [
            f"trains     {', '.join(m.name for m in self.mixtures.values())}{at_once}",
            f"model      {self.config.num_params():,} parameters: {type(self.config).__name__} of {self.config.num_layers} layers"
            f" of {self.config.embed_dim}, {self.config.dtype}",
            f"from       {s.initial_checkpoint_path or f'random parameters, seed {s.seed}'}",
            f"steps      {s.train_steps:,} of {s.batch_size} rows of {first.length} tokens:"
            f" {s.train_steps * tokens / 1e6:,.1f} M tokens each",
            f"mesh       {partitioning.describe(self.mesh)}",
            f"output     {self.output}",
        ]
        if self.validation is not None:
            names = dict.fromkeys(task.name for task in self.validation.tasks)
            examples = sum(len(task.examples) for task in self.validation.tasks)
            lines.insert(-1, f"validated  on {', '.join(names)}: {examples:,} examples")
        if s.is_judged:
            best = "lowest" if s.is_lowest_best else "highest"
            lines.insert(-1, f"judged by  the {best} {s.best_metric}")
        if self.is_done:
            lines.append("done       the output is there already, made so")
        return "\n".join(lines)


def plan(
    settings: Settings,
    mixtures: Sequence[Mixture],
    *,
    is_one: bool = True,
    validation: Validation | None = None,
) -> Plan:
    """Checks everything that can be known before the first step.

    Args:
      settings: what to do.
      mixtures: an expert of each.
      is_one: the only mixture's expert is the output itself, not a folder in it.
      validation: tasks that the run is validated by, beside its loss.

    Raises ValueError (CheckpointError, OutputError) saying what was found, wanted, where, and what to do.
    """
    _check(settings, mixtures)
    _check_validation(settings, mixtures, validation)
    output_dir = epath.Path(settings.output_dir)
    initial = settings.initial_checkpoint_path
    if initial is not None:
        manifest.check_apart(output_dir, [initial])
    if settings.restore_state:
        starts.check_is_train_state(initial)
        settings = dataclasses.replace(settings, params_path=starts.STATE_PARAMS)
    config, vocabulary = _model(settings, mixtures)
    _check_model(settings, config)
    mesh = partitioning.mesh_of(settings.mesh)
    partitioning.shardings(boxed_params(model_of(config)), mesh)
    Placement(
        mesh,
        rows=settings.batch_size,
        length=mixtures[0].length,
        experts=settings.experts_at_once if settings.experts_at_once > 1 else None,
    )
    initial_digest = None
    if initial is not None:
        initial_digest = starts.check(
            initial, config, params_path=settings.params_path, restore=settings.restore
        )
    named = {"" if is_one and len(mixtures) == 1 else m.name: m for m in mixtures}
    identity = _identity(settings, mixtures, config, initial_digest)
    identity |= _judging(settings, validation)
    is_done = manifest.is_done(output_dir, identity)
    if not is_done:
        nbytes = config.num_params() * config.parameter_dtype.itemsize * len(mixtures)
        if settings.checkpoint_every is not None:
            nbytes += 3 * nbytes * (settings.keep_checkpoints + 1)
        manifest.check_free_space(output_dir, nbytes)
    return Plan(
        settings=settings,
        mixtures=named,
        output=output_dir,
        validation=validation,
        config=config,
        mesh=mesh,
        vocabulary=vocabulary,
        initial_digest=initial_digest,
        identity=identity,
        is_done=is_done,
    )


# ---- what is refused -----------------------------------------------------------------------------------------------


def _check(settings: Settings, mixtures: Sequence[Mixture]) -> None:
    s, problems = settings, []
    for name in ("train_steps", "batch_size", "experts_at_once", "microbatches", "log_every"):
        if getattr(s, name) < 1:
            problems.append(f"{name.upper()} is {getattr(s, name)}, wanted at least 1")
    if not mixtures:
        problems.append("there is no mixture to train on")
    names = [m.name for m in mixtures]
    problems += [
        f"{name} is given twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if len({(m.length, m.vocab_size) for m in mixtures}) > 1:
        problems.append("the mixtures' rows differ in length or vocabulary, so no step fits all")
    if s.batch_size % s.microbatches:
        problems.append(f"MICROBATCHES={s.microbatches} don't divide BATCH_SIZE={s.batch_size}")
    if s.choose not in ("last", "best"):
        problems.append(f"CHOOSE is {s.choose!r}, wanted 'last' or 'best'")
    if s.format not in ("orbax", "safetensors"):
        problems.append(f"FORMAT is {s.format!r}, wanted 'orbax' or 'safetensors'")
    if s.is_judged and s.experts_at_once > 1:
        problems.append(
            "CHOOSE='best' and PATIENCE are of one expert: train with EXPERTS_AT_ONCE=1"
        )
    if s.restore and s.initial_checkpoint_path is None:
        problems.append("RESTORE is of a checkpoint: give INITIAL_CHECKPOINT_PATH")
    if s.restore and s.restore_state:
        problems.append("RESTORE is of parameters alone, and RESTORE_STATE takes the whole state")
    if s.experts_at_once > len(mixtures) > 0:
        problems.append(
            f"EXPERTS_AT_ONCE={s.experts_at_once}, and there are {len(mixtures)} mixtures"
        )
    if problems:
        raise ValueError("\n  ".join(["these settings can't be used:", *problems]))


def _check_validation(
    settings: Settings, mixtures: Sequence[Mixture], validation: Validation | None
) -> None:
    """Whether there is what the run is to be validated and judged by."""
    s, problems = settings, []
    has_loss = all(m.validation is not None for m in mixtures)
    known = ["loss", "accuracy"] if has_loss else []
    known += validation.metrics if validation is not None else []
    if s.validate_every is not None and not known:
        problems.append(
            "VALIDATE_EVERY is given and there is nothing to validate on: give mixtures with a validation split, or VALIDATION_TASKS"
        )
    if s.is_judged and s.validate_every is None:
        problems.append("CHOOSE='best' and PATIENCE need VALIDATE_EVERY")
    if s.is_judged and s.best_metric not in known:
        lacking = "" if has_loss else "; 'loss' needs mixtures with a validation split"
        problems.append(
            f"BEST_METRIC is {s.best_metric!r}, wanted one of {', '.join(known) or 'none that is here'}{lacking}"
        )
    if s.best_is not in (None, "lowest", "highest"):
        problems.append(f"BEST_IS is {s.best_is!r}, wanted 'lowest' or 'highest'")
    if not s.is_judged and (s.best_metric != "loss" or s.best_is is not None):
        problems.append(
            "BEST_METRIC and BEST_IS decide nothing without CHOOSE='best' or PATIENCE: give one of these"
        )
    of_data = mixtures[0].vocabulary
    if validation is not None and of_data is not None and of_data.digest is not None:
        if validation.vocabulary_digest != of_data.digest:
            problems.append(
                f"VALIDATION_TASKS are in another vocabulary ({validation.vocabulary_digest[:12]}) than the mixtures"
                f" ({of_data.digest[:12]}): take tasks of the same collection, or give VOCABULARY"
            )
    if problems:
        raise ValueError("\n  ".join(["these settings can't be used:", *problems]))


def _check_model(settings: Settings, config: DecoderConfig) -> None:
    """What is known of the settings once the model is."""
    if settings.format == "safetensors" and isinstance(config, PalmConfig):
        raise ValueError("FORMAT is 'safetensors', and Hugging Face has no PaLM: choose 'orbax'")
    initial = settings.initial_checkpoint_path
    if settings.format == "safetensors":
        if initial is None or not (epath.Path(initial) / "config.json").exists():
            raise ValueError(
                "FORMAT is 'safetensors', and its config.json and tokenizer are those of INITIAL_CHECKPOINT_PATH, which"
                f" {'is None' if initial is None else f'has none ({initial})'}: start from a Hugging Face folder, or choose 'orbax'"
            )
    names, patterns = of_leaves(abstract_params(model_of(config))), settings.frozen
    unused = [p for p in patterns if not any(is_like(name, [p]) for name in names)]
    if unused:
        raise ValueError(
            f"FROZEN: no parameter is like {', '.join(map(repr, unused))}; there are {', '.join(names)}"
        )
    if patterns and all(is_like(name, patterns) for name in names):
        raise ValueError("FROZEN: all parameters are frozen, so there is nothing to train")


def _model(
    settings: Settings, mixtures: Sequence[Mixture]
) -> tuple[DecoderConfig, model_file.Vocabulary | None]:
    """The model's configuration in this run, and its vocabulary."""
    chosen = {
        name: getattr(settings, name)
        for name in ("dropout_rate", "remat", "dtype", "param_dtype")
        if getattr(settings, name) is not None
    }
    config, initial = settings.model, settings.initial_checkpoint_path
    vocabulary = mixtures[0].vocabulary
    if initial is None and config is None:
        raise ValueError(
            "give MODEL (gin_configs/models/*.gin) or INITIAL_CHECKPOINT_PATH to start from"
        )
    if config is None:
        described = model_file.describe(initial)
        config = described.config
        _check_vocabulary(described.vocabulary, vocabulary, str(initial))
        vocabulary = described.vocabulary if vocabulary is None else vocabulary
    config = dataclasses.replace(config, **chosen)
    most = max(m.vocab_size for m in mixtures)
    if most > config.vocab_size:
        raise ValueError(
            f"the mixtures' vocabulary has {most:,} tokens and the model {config.vocab_size:,}: choose the model's own"
            " vocabulary (VOCABULARY), or a MODEL with more"
        )
    return config, vocabulary


def _check_vocabulary(
    of_model: model_file.Vocabulary | None, of_data: model_file.Vocabulary | None, where: str
) -> None:
    if of_model is None or of_data is None or None in (of_model.digest, of_data.digest):
        return
    if of_model.digest != of_data.digest:
        raise ValueError(
            f"{where} was trained on the vocabulary {of_model.name} ({of_model.digest[:12]}), and the mixtures are in"
            f" {of_data.name} ({of_data.digest[:12]}): give the same VOCABULARY"
        )


# ---- the identity --------------------------------------------------------------------------------------------------


def _identity(
    settings: Settings,
    mixtures: Sequence[Mixture],
    config: DecoderConfig,
    initial_digest: str | None,
) -> dict[str, Any]:
    """All that the result depends on, as JSON. How it is cut (mesh, microbatches) changes no more than rounding."""
    s = settings
    return {
        "stage": "finetune",
        "mixtures": {m.name: dict(m.identity) for m in mixtures},
        "initial": initial_digest,
        "params_path": s.params_path,
        "restore": [list(rule) for rule in s.restore],
        "restore_state": s.restore_state,
        "model": json.loads(json.dumps(dataclasses.asdict(config))),
        "train_steps": s.train_steps,
        "batch_size": s.batch_size,
        "seed": s.seed,
        "optimizer": _behaviour(s),
        "z_loss": s.z_loss,
        "clip_norm": s.clip_norm,
        "averaging": s.averaging and dataclasses.asdict(s.averaging),
        "frozen": list(s.frozen),
        "experts_at_once": s.experts_at_once,
        "validate_every": s.validate_every,
        "validation_batches": s.validation_batches,
        "choose": s.choose,
        "patience": s.patience,
        "keep_state": s.keep_state,
        "format": s.format,
    }


def _judging(settings: Settings, validation: Validation | None) -> dict[str, Any]:
    """What a run adds to its identity that is validated by more than its loss."""
    s, added = settings, {}
    if s.best_metric != "loss" or not s.is_lowest_best:
        added["best"] = [s.best_metric, "lowest" if s.is_lowest_best else "highest"]
    if validation is not None:
        added["validation"] = dict(validation.identity)
    return added


def _behaviour(settings: Settings) -> str:
    """What tells an optimizer and its learning rate from others: what they do, since functions have no other name."""
    return manifest.digest(
        [*moves(settings.optimizer), *rates(settings.learning_rate, settings.train_steps)]
    )


@functools.cache
def moves(optimizer: Optimizer) -> tuple[str, ...]:
    """Where three steps of a small problem lead at a learning rate of 1, to four digits."""
    params = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "scale": jnp.asarray([1.0, 0.25])}
    made = optimizer(1.0)

    @jax.jit
    def moved(params: Any, state: Any, number: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda p: jnp.sin(p * (number + 1.0)), params)
        updates, state = made.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = made.init(params)
    numbers: list[float] = []
    for number in range(3):
        params, state = moved(params, state, np.float32(number))
        numbers += [float(x) for leaf in jax.tree.leaves(params) for x in np.ravel(leaf)]
    return tuple(f"{number:.4g}" for number in numbers)


def rates(learning_rate: Any, train_steps: int) -> tuple[str, ...]:
    """A learning rate over a run, at up to 17 of its steps if it is a function of them, to four digits."""
    if not callable(learning_rate):
        return (f"{float(learning_rate):.4g}",)
    places = np.unique(np.linspace(0, train_steps - 1, 17).astype(np.int32))
    return tuple(f"{float(learning_rate(place)):.4g}" for place in places)
