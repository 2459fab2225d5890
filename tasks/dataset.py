"""What a dataset is to the study: rows from a source, put into words by several prompts, judged by one metric.

One dataset is one file of `tasks/datasets`, which says `DATASETS = (Dataset(...), ...)`: more than one only for the
parts of one dataset. Nothing here knows TensorFlow: a prompt is a function of a row (a dict as the source gives it) to
an Example.

  row -> view (the fields that prompts speak of) -> prompt -> Example(inputs, targets, choices, label, references)
"""

from __future__ import annotations

import dataclasses
import difflib
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tasks.sources import Source

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example in words.

    Attributes:
      inputs: what the model reads; may be empty.
      targets: what it should write.
      choices: what is ranked; as many as this example has. Empty where the answer is generated.
      label: the index of the right choice; None where generated.
      references: all answers that count as right, the targets among them.

    White space around a text is taken off: whether a space stands between inputs and targets is up to the vocabulary.
    """

    inputs: str
    targets: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            object.__setattr__(self, name, getattr(self, name).strip())
        for name in ("choices", "references"):
            object.__setattr__(self, name, tuple(each.strip() for each in getattr(self, name)))
        if not self.references:
            object.__setattr__(self, "references", (self.targets,))
        if (self.label is None) == bool(self.choices):
            raise ValueError(f"choices and a label go together; found {self}")
        if self.choices:
            if not 0 <= self.label < len(self.choices):
                raise ValueError(
                    f"the label is {self.label}, but there are {len(self.choices)} choices: {self}"
                )
            if self.targets != self.choices[self.label]:
                raise ValueError(f"the targets are not the labelled choice: {self}")


# None: the prompt has nothing to say about this row (some of P3's haven't).
Prompt = Callable[[Row], Example | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """A prompt whose answer is one of some choices.

    Attributes:
      inputs: a template; `{name}` stands for a field.
      choices: templates, or the name of a field that holds the choices of its row.
      label: the field that holds the index of the right one.
    """

    inputs: str
    choices: tuple[str, ...] | str
    label: str = "label"

    def __call__(self, row: Row) -> Example:
        if isinstance(self.choices, str):
            choices = tuple(row[self.choices])
        else:
            choices = tuple(choice.format_map(row) for choice in self.choices)
        label = int(row[self.label])
        if not 0 <= label < len(choices):
            raise ValueError(f"the label is {label}, but there are {len(choices)} choices")
        return Example(
            inputs=self.inputs.format_map(row), targets=choices[label], choices=choices, label=label
        )

    @property
    def fields(self) -> set[str]:
        """The fields it speaks of."""
        if isinstance(self.choices, str):
            return {*_named(self.inputs), self.choices, self.label}
        return {*_named(self.inputs, *self.choices), self.label}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A prompt whose answer is written freely.

    Attributes:
      inputs: a template; `{name}` stands for a field.
      targets: a template of what is learnt.
      references: the field that holds all right answers of its row; None: the targets are the only one.
    """

    inputs: str
    targets: str
    references: str | None = None

    def __call__(self, row: Row) -> Example:
        references = tuple(row[self.references]) if self.references else ()
        return Example(
            inputs=self.inputs.format_map(row),
            targets=self.targets.format_map(row),
            references=references,
        )

    @property
    def fields(self) -> set[str]:
        """The fields it speaks of."""
        return {*_named(self.inputs, self.targets), *([self.references] if self.references else [])}


def as_it_is(row: Row) -> Row:
    """The view of a dataset whose prompts speak of its own columns."""
    return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of the study, or a part of one.

    Attributes:
      name: of letters, digits and underscores; tasks are `<name>_<prompt>` and a suffix of the collection.
      category: one of `catalog.CATEGORIES`, which gives its role.
      metric: one of `metrics.METRICS`.
      fields: the columns of a row that the view, or the prompts, read.
      view: from a row to the fields that prompts speak of.
      view_fields: the fields that the view adds.
      prompts: by name.
      sources: by collection: "" (TFDS and Hugging Face), "local" (JSON lines in a folder) or "mini" (the built-in
        world).
      part_of: the dataset whose score is the mean of its parts' scores; None: it counts by itself.
      is_counted: false for what is scored but stays out of the study's means.
      aliases: other names under which the same data goes around, for the check of instruction mixtures.
      p3: its name in P3, whose prompts can take the place of ours; "" where it isn't there.
      link: where it is described.
    """

    name: str
    category: str
    metric: str
    fields: tuple[str, ...]
    prompts: Mapping[str, Prompt]
    sources: Mapping[str, Source]
    view: Callable[[Row], Row] = as_it_is
    view_fields: tuple[str, ...] = ()
    part_of: str | None = None
    is_counted: bool = True
    aliases: tuple[str, ...] = ()
    p3: str = ""
    link: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"{self.name} has no prompt")
        known = {*self.fields, *self.view_fields}
        for name, prompt in self.prompts.items():
            for field in sorted(getattr(prompt, "fields", set()) - known):
                raise ValueError(
                    f"prompt {name!r} of {self.name} speaks of a field {field!r};{nearest(field, known)}"
                    f" known: {', '.join(sorted(known))}"
                )

    def render(self, prompt: str, row: Row) -> Example | None:
        """One row in the words of one prompt; None where the prompt passes over it.

        Raises:
          ValueError: for a row without a field it must have, with a label outside its choices, or with values of other types.
        """
        for field in self.fields:
            if field not in row:
                raise ValueError(
                    f"a row of {self.name} has no field {field!r}, which it must have;"
                    f"{nearest(field, row)} found: {', '.join(sorted(row))}"
                )
        try:
            return self.prompts[prompt](_Fields(self.view(row)))
        except _MALFORMED as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"prompt {prompt!r} of {self.name}: {kind}{error}; the row is {dict(row)}"
            ) from error


# What views and templates raise of values that are not as the fields promise.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError)


def listed(choices: Iterable[str]) -> str:
    """One choice a line, as prompts show them."""
    return "\n".join(f"- {choice}" for choice in choices)


class _Fields(dict):
    """A view of a row that names what a prompt asked for in vain."""

    def __missing__(self, field: str) -> Any:
        raise ValueError(
            f"there is no field {field!r};{nearest(field, self)} known: {', '.join(sorted(self))}"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """` did you mean A or B?`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" did you mean {' or '.join(near)}?" if near else ""


def _named(*templates: str) -> set[str]:
    """The fields that templates name: `{a}`, `{b[0]}`."""
    names = (name for each in templates for _, name, _, _ in string.Formatter().parse(each) if name)
    return {name.split("[")[0].split(".")[0] for name in names}
