"""mergekit's YAML as the settings of a merge here, which give the same tensors.

Read are the methods that both have (linear, task_arithmetic, ties, dare_linear, dare_ties) with all that mergekit 0.1.5 lets one
set of them; filters and gradients over layers become PATTERNS, evaluated leaf by leaf as mergekit does: a gradient runs over
the layers of its slice, and what lies in no layer (embeddings, last norm, readout) takes its first value. A trim is that of
each tensor, a vote of zero elects +, DARE restores L1 norms, linear averages a base_model with its models. All else is refused
by name: nothing is left out in silence. Filters are held against the base's leaf names, in Hugging Face's spelling mergekit's.

Deviations: arithmetic is in float32 whatever `dtype` says, which is the type of the output (`out_dtype` before it). DARE's masks are
those of `draw`, not torch's. What `tests/merging/test_mergekit_parity.py` lists.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from merging.checkpoints import open_checkpoint
from merging.checkpoints.known_layouts import layer_of
from merging.checkpoints.safetensors_header import load_json
from merging.engine.plan import OUTPUT_DTYPES
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties

_PLACES = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_TOKENIZERS = ("tokenizer_source", "tokenizer")
_NOT_HERE = ("modules", "chat_template")

_NORMALIZED = ("linear", "ties")  # by default
_RESCALED = ("dare_linear", "dare_ties")
_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")

_EMBEDDING = re.compile(
    r"embed(?!_out)|wte|wpe", re.IGNORECASE
)  # before the first layer; embed_out is GPT-NeoX's readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translated:
    """A configuration of mergekit's.

    Attributes:
      settings: fields of `engine.plan.Settings`: base, experts, method, patterns, output_dtype.
      notes: what is said there and means nothing, or something else, here.
    """

    settings: Mapping[str, Any]
    notes: Sequence[str]


class MergekitError(ValueError):
    """A configuration that can't be done here as it is: says which key, what was found and what to do."""


def translate(path: epath.PathLike) -> Translated:
    """Reads a configuration, and the names of the leaves of its base.

    Raises MergekitError for what isn't mergekit's, and for what mergekit has and this has not; CheckpointError where the base
    is no checkpoint.
    """
    try:
        return _Reader(_load(path)).translated()
    except MergekitError as error:
        raise MergekitError(f"{path}: {error}") from error


def _load(path: epath.PathLike) -> dict[str, Any]:
    try:
        config = yaml.safe_load(epath.Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergekitError(f"it can't be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise MergekitError("it holds no keys; wanted merge_method, models and so on")
    for key in config:
        if key in _NOT_HERE:
            raise MergekitError(f"{key} is not supported here; remove it, or do it by mergekit")
    _check_keys(config, (*_PLACES, *_TOKENIZERS), "the file")
    return config


# ---- the pieces of a configuration ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Layers of the output.

    Attributes:
      layers: (first, behind the last); None for all.
      parameters: of the slice.
      models: parameters by name of the model, in order.
    """

    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """The numbers of one leaf."""

    scale: float
    weights: tuple[float, ...]
    densities: tuple[float, ...]


class _Reader:
    """One configuration, being read."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.notes: list[str] = []
        self.method = _one_of(config.get("merge_method"), _METHODS, "merge_method")
        self.parameters = _mapping(config.get("parameters"), "parameters")
        self._check_parameters(self.parameters, "parameters", of_model=False)
        self.slices = self._read_slices()
        self.base = self._read_base()
        models = list(self.slices[0].models)
        for i, each in enumerate(self.slices):
            if list(each.models) != models:
                raise MergekitError(
                    f"slices[{i}] has the models {list(each.models)}, slices[0] has {models}: all slices must have the same"
                )
        if self.method != "linear":
            models = [name for name in models if name != self.base]
        elif self.base not in models and "models" in self.config:
            models.append(self.base)
            self.notes.append(
                f"base_model {self.base} is averaged with the models, the last of them, as in mergekit: leave base_model out"
                " to average the models alone"
            )
        self.experts = models
        if not self.experts:
            raise MergekitError(
                f"there is no model beside the base_model {self.base}: name its experts"
            )
        for name in dict.fromkeys((self.base, *self.experts)):
            _check_folder(name)
        self._check_tokenizer()

    def translated(self) -> Translated:
        leaves = self._leaves()
        words = {name: self._words(name) for name in leaves}
        if len(set(words.values())) > 1:
            raise MergekitError(
                "normalize and rescale must be the same for all leaves here; filters and gradients may set weight, density"
                " and lambda"
            )
        normalize, rescale = next(iter(words.values()))
        recipes = {name: self._recipe(name, normalize) for name in leaves}
        method, patterns = self._with_patterns(recipes, normalize, rescale)
        settings = {
            "base": self.base,
            "experts": self.experts,
            "method": method,
            "patterns": patterns or None,
            "output_dtype": self._dtype(),
        }
        return Translated(settings=settings, notes=tuple(dict.fromkeys(self.notes)))

    # ---- models and slices ------------------------------------------------------------------------------------------

    def _read_slices(self) -> list[_Slice]:
        given = [key for key in ("models", "slices") if self.config.get(key)]
        if len(given) != 1:
            raise MergekitError("wanted one of models and slices")
        if given == ["models"]:
            sources = self._read_sources(self.config["models"], "models", ())
            return [_Slice(None, {}, {name: parameters for name, parameters, _ in sources})]
        slices, reached = [], 0
        for i, entry in enumerate(_list(self.config["slices"], "slices")):
            where = f"slices[{i}]"
            entry = _mapping(entry, where)
            _check_keys(entry, ("sources", "parameters"), where)
            sources = self._read_sources(entry.get("sources"), f"{where}.sources", ("layer_range",))
            ranges = {layers for _, _, layers in sources}
            first, stop = next(iter(ranges))
            if len(ranges) > 1 or first != reached or stop <= first:
                raise MergekitError(
                    f"{where} takes the layers {sorted(ranges)}: here all models must give the same layers, and slices"
                    f" follow one another from layer 0 to the last (wanted [{reached}, ...)); models put together of layers of"
                    " others (passthrough and its kind) are not supported"
                )
            reached = stop
            parameters = _mapping(entry.get("parameters"), f"{where}.parameters")
            self._check_parameters(parameters, f"{where}.parameters", of_model=False)
            slices.append(_Slice((first, stop), parameters, {n: p for n, p, _ in sources}))
        return slices

    def _read_sources(
        self, entries: Any, where: str, more: Sequence[str]
    ) -> list[tuple[str, Mapping[str, Any], tuple[int, int]]]:
        """(model, parameters, layers) of each."""
        sources = []
        for i, entry in enumerate(_list(entries, where)):
            here = f"{where}[{i}]"
            entry = _mapping(entry, here)
            _check_keys(entry, ("model", "parameters", *more), here)
            parameters = _mapping(entry.get("parameters"), f"{here}.parameters")
            self._check_parameters(parameters, f"{here}.parameters", of_model=True)
            layers = entry.get("layer_range", [0, 0])
            if not (isinstance(layers, list) and [type(n) for n in layers] == [int, int]) or (
                more and "layer_range" not in entry
            ):
                raise MergekitError(f"{here}.layer_range is {layers!r}: wanted [first, last + 1]")
            sources.append((_model(entry.get("model"), here), parameters, tuple(layers)))
        names = [name for name, _, _ in sources]
        for name in names:
            if names.count(name) > 1:
                raise MergekitError(f"{where} names {name} twice")
        return sources

    def _read_base(self) -> str:
        named = self.config.get("base_model")
        if named is not None:
            return _model(named, "base_model")
        if self.method != "linear":
            raise MergekitError(f"base_model is missing, which {self.method} needs")
        return next(iter(self.slices[0].models))  # gives names and types

    def _check_parameters(
        self, parameters: Mapping[str, Any], where: str, *, of_model: bool
    ) -> None:
        each = ["weight"] if self.method == "linear" else ["weight", "density"]
        shared = ["normalize"]
        if self.method != "linear":
            shared += ["lambda", "rescale", "int8_mask"]
        for key in parameters:
            if of_model and key in shared:
                raise MergekitError(
                    f"{where}.{key}: {key} is one for all models: move it to the file's own parameters"
                )
        _check_keys(parameters, each if of_model else [*each, *shared], where)
        if self.method == "task_arithmetic":
            for key in ("density", "rescale"):
                if key in parameters:
                    self.notes.append(f"{key} means nothing to task_arithmetic, as in mergekit")
        if "int8_mask" in parameters:
            self.notes.append("int8_mask means nothing here: masks are never stored")

    def _check_tokenizer(self) -> None:
        """The base's tokenizer goes along; another, or a union, would change the rows of embeddings."""
        source = self.config.get("tokenizer_source")
        tokenizer = self.config.get("tokenizer")
        if tokenizer is not None:
            if source is not None:
                raise MergekitError("give one of tokenizer_source and tokenizer")
            tokenizer = _mapping(tokenizer, "tokenizer")
            source = tokenizer.get("source", "union")
            for key in tokenizer:
                if key != "source":
                    raise MergekitError(
                        f"tokenizer.{key} is not supported here: the base's tokenizer goes along as it is"
                    )
        if source is None:
            return
        if source not in ("base", self.base):
            raise MergekitError(
                f"tokenizer_source is {source!r}: only 'base' is supported here, the tokenizer of {self.base}; bring the"
                " embeddings of all models to one vocabulary first"
            )
        tokens = _tokens(self.base)
        for name in self.experts:
            theirs = _tokens(name)
            if None not in (tokens, theirs) and tokens != theirs:
                raise MergekitError(
                    f"tokenizer_source is 'base', and the tokenizer of {name} gives tokens other numbers than that of"
                    f" {self.base}: rows of embeddings are not put in another order here; bring the models to one vocabulary"
                    " first"
                )

    # ---- what holds for one leaf --------------------------------------------------------------------------------------

    def _leaves(self) -> list[str]:
        """The base's float leaves; also counts its layers, and checks that the slices are all of them."""
        reader = open_checkpoint(self.base)
        try:
            leaves = [name for name, spec in reader.specs().items() if spec.is_merged]
        finally:
            reader.close()
        self.layers: dict[
            str, int
        ] = {}  # by the path of the stack: a model of text and images has two
        for layer, number in filter(None, map(layer_of, leaves)):
            stack = _stack_of(layer)
            self.layers[stack] = max(self.layers.get(stack, 0), number + 1)
        last = self.slices[-1].layers
        if last is not None and list(self.layers.values()) != [last[1]]:
            has = " and ".join(f"{count} {stack}" for stack, count in self.layers.items())
            raise MergekitError(
                f"slices end at layer {last[1]}, and {self.base} has {has or 'none'}: here a merge has all layers of its base"
            )
        return leaves

    def _place(self, leaf: str) -> tuple[_Slice, float | None]:
        """The slice of a leaf, and where in it from 0 to 1; None where the model has no layers by number."""
        found = layer_of(leaf)
        if found is None:
            t = 0.0 if self.layers else None
            return self.slices[0 if _EMBEDDING.search(leaf) else -1], t
        layer, number = found
        for each in self.slices:
            first, stop = each.layers or (0, self.layers[_stack_of(layer)])
            if first <= number < stop:
                return each, (number - first) / (stop - first - 1) if stop - first > 1 else 1.0
        raise AssertionError(f"{leaf} is in no slice")

    def _sources(self, each: _Slice, model: str | None) -> list[Mapping[str, Any]]:
        of_model = [] if model is None else [each.models.get(model, {})]
        return [*of_model, each.parameters, self.parameters]

    def _words(self, leaf: str) -> tuple[bool, bool]:
        """(normalize, rescale)."""
        each, t = self._place(leaf)
        look = functools.partial(_resolve, self._sources(each, None), leaf=leaf, t=t, kind=_truth)
        normalize = look("normalize", default=self.method in _NORMALIZED)
        rescale = look("rescale", default=self.method in _RESCALED)
        if rescale and self.method == "ties":
            raise MergekitError("rescale: true of ties is not supported here; set it to false")
        return normalize, rescale

    def _recipe(self, leaf: str, normalize: bool) -> _Recipe:
        each, t = self._place(leaf)
        look = functools.partial(_resolve, leaf=leaf, t=t, kind=_number)
        scale = look(self._sources(each, None), "lambda", default=1.0)
        weights, densities = [], []
        for model in self.experts:
            sources = self._sources(each, model)
            weight = look(sources, "weight", default=None)
            if weight is None:
                raise MergekitError(f"weight is missing for {leaf} of {model}")
            density = look(sources, "density", default=1.0)
            if density <= 0 and self.method not in ("linear", "task_arithmetic"):
                if normalize and self.method == "dare_linear":
                    raise MergekitError(
                        f"density is {density} for {leaf} of {model}: with normalize, leave the model out instead"
                    )
                weight, density = 0.0, 1.0  # nothing of it is left
            weights.append(weight)
            densities.append(min(density, 1.0))
        if (
            normalize
            and self.method in ("task_arithmetic", "dare_linear")
            and abs(sum(weights)) < 1e-8
        ):
            raise MergekitError(
                f"the weights of {leaf} are {weights}, whose sum mergekit takes for 0 and does not normalize by: set"
                " normalize to false, or other weights"
            )
        if self.method in ("linear", "task_arithmetic"):
            densities = [1.0] * len(densities)
        return _Recipe(scale, tuple(weights), tuple(densities))

    # ---- together -----------------------------------------------------------------------------------------------------

    def _with_patterns(
        self, recipes: Mapping[str, _Recipe], normalize: bool, rescale: bool
    ) -> tuple[Method, dict[str, dict[str, Any]]]:
        """The method as most leaves have it, and what is set otherwise; of each layer, its leaves that differ come first."""
        is_plain = all(set(r.weights) == {1.0} for r in recipes.values())
        is_one = all(len(set(r.densities)) == 1 for r in recipes.values())
        fields, methods = {}, {}
        for leaf, recipe in recipes.items():
            if recipe not in fields:
                fields[recipe] = self._fields(recipe, is_plain=is_plain, is_one=is_one)
                try:
                    methods[recipe] = self._method(fields[recipe], normalize, rescale)
                except ValueError as error:
                    raise MergekitError(f"{leaf}: {error}") from error
        most = _most_common(recipes.values())
        groups: dict[str | None, dict[str, _Recipe]] = {}  # by layer
        for leaf, recipe in recipes.items():
            groups.setdefault((layer_of(leaf) or (None,))[0], {})[leaf] = recipe
        patterns = {}
        for layer, members in groups.items():
            usual = most if layer is None else _most_common(members.values())
            for leaf, recipe in members.items():
                if recipe != usual:
                    patterns[glob.escape(leaf)] = fields[recipe]
            if usual != most:
                patterns[f"{glob.escape(layer)}/*"] = fields[usual]
        same = [
            key
            for key, value in fields[most].items()
            if all(each[key] == value for each in patterns.values())
        ]
        return methods[most], {
            pattern: {key: value for key, value in each.items() if key not in same}
            for pattern, each in patterns.items()
        }

    def _fields(self, recipe: _Recipe, *, is_plain: bool, is_one: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {"weights": None if is_plain else recipe.weights}
        if self.method != "linear":
            fields["scale"] = recipe.scale
        if self.method not in ("linear", "task_arithmetic"):
            fields["density"] = recipe.densities[0] if is_one else recipe.densities
        return fields

    def _method(self, fields: Mapping[str, Any], normalize: bool, rescale: bool) -> Method:
        combine = "mean" if normalize else "sum"
        if self.method == "linear":
            return Averaging(**fields, combine=combine)
        if self.method == "task_arithmetic":
            return TaskArithmetic(**fields, combine=combine)
        if self.method == "ties":
            return Ties(**fields, scope="tensor", zero_sign="positive", combine=combine)
        rescaled = "l1" if rescale else "none"
        if self.method == "dare_linear":
            return Dare(**fields, rescale=rescaled, combine=combine)
        return DareTies(**fields, rescale=rescaled, zero_sign="positive", combine=combine)

    def _dtype(self) -> str | None:
        """Of the output."""
        for key in ("dtype", "out_dtype"):
            if self.config.get(key) is not None:
                _one_of(self.config[key], OUTPUT_DTYPES, key)
        working = self.config.get("dtype")
        stored = self.config.get("out_dtype") or working
        if working not in (None, "float32"):
            self.notes.append(
                f"dtype is {working}: here arithmetic is in float32, and rounded once, to {stored}"
            )
        return stored


# ---- values --------------------------------------------------------------------------------------------------------


def _resolve(
    sources: Iterable[Mapping[str, Any]],
    key: str,
    *,
    leaf: str,
    t: float | None,
    kind: Any,
    default: Any,
) -> Any:
    """The first of the sources that sets the key for this leaf."""
    for source in sources:
        if key in source:
            value = _evaluated(source[key], leaf, t, kind, key)
            if value is not None:
                return value
    return default


def _evaluated(setting: Any, leaf: str, t: float | None, kind: Any, key: str) -> Any:
    """A scalar, a gradient, or the first condition whose filter is part of the leaf's name; None where none is."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return kind(setting, key)
    if all(not isinstance(each, dict | list) for each in setting):
        return _on_gradient([kind(each, key) for each in setting], t, key)
    for condition in setting:
        condition = _mapping(condition, key)
        _check_keys(condition, ("filter", "value"), key)
        wanted = condition.get("filter")
        if wanted in (None, "*") or wanted in leaf:
            if condition.get("value") is None:
                raise MergekitError(f"{key}: a filter has no value")
            return _evaluated(condition["value"], leaf, t, kind, key)
    return None


def _stack_of(layer: str) -> str:
    """`model/layers/7` -> `model/layers`."""
    return layer.rpartition("/")[0]


def _most_common(recipes: Iterable[_Recipe]) -> _Recipe:
    return collections.Counter(recipes).most_common(1)[0][0]


def _on_gradient(values: list[Any], t: float | None, key: str) -> Any:
    if not values:
        return None
    if t is None:
        raise MergekitError(
            f"{key} is a gradient over layers, and no leaf of the base has a layer's number: convert it by launch.convert"
            " --layout=unstacked first"
        )
    at = t * (len(values) - 1)
    first = int(at)
    if isinstance(values[0], bool):
        return values[first]
    share = at - first
    return (1 - share) * values[first] + share * values[min(len(values) - 1, first + 1)]


def _number(value: Any, key: str) -> float:
    """A finite float; YAML takes 1e-3 for text."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise MergekitError(f"{key} is {value!r}: wanted a finite number")


def _truth(value: Any, key: str) -> bool:
    if value in (True, False):  # 0 and 1 as well
        return bool(value)
    raise MergekitError(f"{key} is {value!r}: wanted true or false")


# ---- checks ----------------------------------------------------------------------------------------------------------


def _model(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise MergekitError(f"{where}: the model is {value!r}: wanted the path of a folder")
    return value


def _check_folder(name: str) -> None:
    if epath.Path(name).exists():
        return
    if "+" in name and epath.Path(name.split("+")[0]).exists():
        raise MergekitError(
            f"{name}: adapters (model+lora) are not supported: merge it into its model first"
        )
    raise MergekitError(
        f"the model {name} is no folder here: models are read from disk; download it and write its path"
    )


def _tokens(folder: str) -> tuple[Any, Any] | None:
    """What numbers a folder's tokenizer.json gives to tokens; None where there is none."""
    path = epath.Path(folder) / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = load_json(path.read_bytes(), str(path))
    added = tokenizer.get("added_tokens") or []
    return (tokenizer.get("model") or {}).get("vocab"), [
        (a.get("id"), a.get("content")) for a in added
    ]


def _one_of(value: Any, choices: Sequence[str], key: str) -> str:
    if value in choices:
        return value
    raise MergekitError(f"{key} is {value!r}: supported here are {', '.join(choices)}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    """{} for what is left empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MergekitError(f"{where} is {value!r}: wanted keys and values")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise MergekitError(f"{where} is {value!r}: wanted a list")
    return value


def _check_keys(found: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f" did you mean {near[0]}?" if near else f" known are {', '.join(known)}"
            raise MergekitError(f"{where} has the key {key!r}, which is not supported here;{meant}")
