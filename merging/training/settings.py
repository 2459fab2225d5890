"""What a run is asked to train, on what and how: plain data, made by who reads text and configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath

from merging.models import model_file
from merging.models.config import DecoderConfig
from merging.partitioning import MeshShape
from merging.training.feed import Source
from merging.training.optimizer import WeightAveraging, adamw
from merging.training.validation import LOWEST

# (regular expression of a parameter's name, name of the checkpoint's leaf or None), see `training.initial`
Restore = Sequence[tuple[str, str | None]]

# (learning rate, a number or a function of the step) -> optimizer
Optimizer = Callable[[Any], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """What an expert is trained on; made by who reads text.

    Attributes:
      name: of the mixture, and of the expert's folder where there are several.
      train: (batch_size, host, hosts) -> batches.
      validation: the same, of examples that are not trained on; None: none.
      length: tokens of a row.
      vocab_size: tokens are below it.
      vocabulary: of the tokens, to go along with the parameters.
      identity: JSON, all that the batches depend on.
    """

    name: str
    train: Callable[[int, int, int], Source]
    validation: Callable[[int, int, int], Source] | None = None
    length: int
    vocab_size: int
    vocabulary: model_file.Vocabulary | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and how.

    Attributes:
      output_dir: folder to be made.
      train_steps: of each expert.
      batch_size: rows of a batch, over all devices.
      initial_checkpoint_path: a checkpoint of any format to start from; None: from random parameters.
      params_path: where its parameters are in a train state.
      restore: which parameters are taken from it and from which leaves, see `training.initial`; (): all, by their own names.
      restore_state: it is a train state of this stage, whose step and optimizer's moments are gone on from too; `train_steps`
        counts from the state's beginning, and the data begins anew.
      model: configuration; None: the checkpoint says it.
      optimizer: learning rate -> optax transformation.
      learning_rate: a number, or a function of the step.
      seed: of new parameters and of dropout.
      mesh: how devices are used, all of them unless it is a mesh of some; None: along the data axis.
      dropout_rate, remat, dtype, param_dtype: of the model in this run; None: as its configuration has them.
      z_loss: coefficient; None: the configuration's, or 0.
      clip_norm: of gradients; None: not clipped.
      microbatches, vocabulary_chunks: see `training.step.train_step`.
      averaging: of weights; None: the last ones count.
      frozen: patterns of parameters that stay as they are.
      experts_at_once: how many are trained by one step; 1: one after another.
      log_every, validate_every, checkpoint_every, patience: see `training.loop.Schedule`.
      validation_batches: of each validation.
      keep_checkpoints: how many of the newest stay.
      choose: "last", or "best" on validation.
      best_metric: by which `choose` and `patience` judge: "loss", "accuracy", or one of `Validation.metrics`.
      best_is: its "lowest" or "highest"; None: the lowest of losses, the highest of others.
      keep_state: the last train states stay in the output, to go on from.
      format: "orbax" or "safetensors" (Hugging Face's, where the model is of such a family).
      peak_flops: of one device, in operations a second, for the share of it that was used; None: not told.
    """

    output_dir: epath.PathLike
    train_steps: int
    batch_size: int
    initial_checkpoint_path: epath.PathLike | None = None
    params_path: str | None = None
    restore: Restore = ()
    restore_state: bool = False
    model: DecoderConfig | None = None
    optimizer: Optimizer = adamw
    learning_rate: Any = 3e-5
    seed: int = 0
    mesh: MeshShape | jax.sharding.Mesh | None = None
    dropout_rate: float | None = None
    remat: str | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    z_loss: float | None = None
    clip_norm: float | None = 1.0
    microbatches: int = 1
    vocabulary_chunks: int = 1
    averaging: WeightAveraging | None = None
    frozen: Sequence[str] = ()
    experts_at_once: int = 1
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int = 8
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    choose: str = "last"
    best_metric: str = "loss"
    best_is: str | None = None
    patience: int | None = None
    keep_state: bool = False
    format: str = "orbax"
    peak_flops: float | None = None

    @property
    def is_judged(self) -> bool:
        """Whether validations decide something."""
        return self.choose == "best" or self.patience is not None

    @property
    def is_lowest_best(self) -> bool:
        """Whether less of `best_metric` is better."""
        if self.best_is is None:
            return self.best_metric.rpartition("/")[2] in LOWEST
        return self.best_is == "lowest"
