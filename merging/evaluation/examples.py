"""What is evaluated, as plain data: examples as tokens, and how a task's predictions are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Kind = Literal["rank", "generate", "loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example.

    Attributes:
      id: unique within its task.
      prompt: [p] int32, what the model reads, from the start token on; at least that.
      choices: [c] int32 each, what may follow; of a loss the one text; none where the answer is generated.
      truth: what the metric compares the prediction with.
      prompt_text, choices_text: the same in words, for records.
      nbytes: UTF-8 bytes of each choice, which bits per byte are of.
    """

    id: str
    prompt: np.ndarray
    choices: tuple[np.ndarray, ...]
    truth: Any
    prompt_text: str = ""
    choices_text: tuple[str, ...] = ()

    @property
    def nbytes(self) -> list[int]:
        return [len(each.encode()) for each in self.choices_text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Examples of one dataset in the words of one prompt.

    Attributes:
      name: of the dataset.
      prompt: of the wording.
      kind: choices are ranked, answers generated, or texts scored.
      examples: at least one.
      metric: (truths, predictions) -> values, `x_stderr` beside each `x`; predictions are numbers of choices, or texts. Of a
        loss none.
      chance: what guessing gives, told beside the metric's values; None where there is no such thing.
      decode: generated tokens, without the end, as text.
      eos_id, max_new_tokens: of generation.
      cut_inputs, cut_targets: examples whose prompt or choices lost tokens when they were made, to be told.
    """

    name: str
    prompt: str
    kind: Kind
    examples: Sequence[Example]
    metric: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]] | None = None
    chance: float | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    eos_id: int | None = None
    max_new_tokens: int = 0
    cut_inputs: int = 0
    cut_targets: int = 0

    def __post_init__(self) -> None:
        where = f"task {self.name}, prompt {self.prompt}"
        if not self.examples:
            raise ValueError(f"{where} has no example: wanted at least one")
        if self.kind == "generate" and (self.decode is None or self.max_new_tokens < 1):
            raise ValueError(f"{where} is generated: it needs `decode` and max_new_tokens")
        for example in self.examples:
            if len(example.prompt) < 1:
                raise ValueError(f"{where}, example {example.id}: the prompt lacks the start token")
            if self.kind != "generate" and not all(len(each) for each in example.choices or [()]):
                raise ValueError(
                    f"{where}, example {example.id}: a choice without a token, or no choice at all"
                )

    @property
    def key(self) -> tuple[str, str]:
        """What identifies it among a run's tasks."""
        return self.name, self.prompt
