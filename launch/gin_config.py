"""gin, in one file: T5X's flags and order, and an error wherever gin takes a mistake in silence.

All files are read in order, then all bindings, later ones winning. `--gin.NAME=VALUE` is short for
`--gin_bindings="NAME = VALUE"`. Unknown functions and parameters are errors (gin), and so are mistyped macros, macros
left at `%gin.REQUIRED` (all of them in one message) and strings without their inner quotes (here).

gin binds stage functions and the dataclasses they take, and nothing in the library knows it: what may be bound is
registered here, and a stage is called by its entry point with the values that `resolve` returns.

A must-have is written `NAME = %gin.REQUIRED  # e.g. 'value'`; the comment becomes part of the error message.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from absl import flags
from gin import config_parser

import gin_configs

GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "A gin file, looked up in --gin_search_paths; may be repeated, later ones win."
)
GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings",
    [],
    "A binding, 'NAME = VALUE', read after all files; --gin.NAME=VALUE is short for it.",
)
GIN_SEARCH_PATHS = flags.DEFINE_list(
    "gin_search_paths",
    ["."],
    "Folders in which gin files are looked up; the project's own configurations come last, the first hit wins.",
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what would be done, check the inputs, and write nothing."
)

CONFIGS = pathlib.Path(gin_configs.__file__).parent
REQUIRED = "gin.REQUIRED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a configuration says about one stage.

    Attributes:
      arguments: keyword arguments for the stage.
      text: the operative configuration: every value in use, defaults included, as a gin file that gives the same again.
    """

    arguments: Mapping[str, Any]
    text: str


def rewrite_arguments(argv: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` as the flag that absl knows."""
    return [_rewritten(argument) for argument in argv]


def shorthand(
    macros: Mapping[str, Any],
    files: Sequence[str],
    *,
    run_file: str,
    more: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The gin files and bindings that short flags stand for, around the files that were given.

    Args:
      macros: what each flag sets; None was not given.
      files: given by --gin_file.
      run_file: the stage's own, read first unless it or others are given and no flag needs it.
      more: files that flags name, read last.
    """
    bindings = [f"{name} = {value!r}" for name, value in macros.items() if value is not None]
    is_needed = bindings or more or not files
    first = [run_file] if is_needed and run_file not in files else []
    return [*first, *files, *more], bindings


def register(stage: Callable[..., Any], *, name: str) -> None:
    """Makes the arguments of a stage bindable as `name.argument`. Safe to call twice."""
    _stage(stage, name)


@functools.cache
def register_methods() -> None:
    """Makes every merge method bindable under its class name. Safe to call twice."""
    from merging import methods

    with gin.unlock_config():  # locked where another stage was parsed before
        for method in methods.METHODS.values():
            gin.external_configurable(method, module=method.__module__)


@functools.cache
def register_values(*makers: Callable[..., Any]) -> None:
    """Makes classes and functions that give a stage its arguments bindable under their names. Safe to call twice."""
    with gin.unlock_config():
        for maker in makers:
            gin.external_configurable(maker, module=maker.__module__)


def register_models() -> None:
    """Makes what configures models and meshes bindable: gin_configs/models and gin_configs/meshes. Safe to call twice."""
    from merging.models.config import Gemma3Config, LlamaConfig, PalmConfig, named
    from merging.partitioning import MeshShape

    register_values(named, PalmConfig, LlamaConfig, Gemma3Config, MeshShape)


@functools.cache
def register_optax() -> None:
    """Makes optax's optimizers and schedules bindable as `optax.name`, but for those that the library has itself."""
    import optax

    with gin.unlock_config():
        for name, maker in vars(optax).items():
            has_ours = name in ("adamw", "adafactor")
            if inspect.isfunction(maker) and maker.__module__ in _OPTAX_MAKERS and not has_ours:
                gin.external_configurable(maker, name=name, module="optax")


_OPTAX_MAKERS = ("optax._src.alias", "optax.schedules._schedule", "optax.schedules._join")


def parse(
    files: Sequence[str],
    bindings: Sequence[str],
    *,
    search_paths: Sequence[str] = (".",),
    either: Mapping[str, str] | None = None,
) -> None:
    """Reads files, then bindings, checks the whole and locks it. What it may bind must be registered before.

    Args:
      files: names, absolute or to be found in the search paths.
      bindings: `NAME = VALUE` each.
      search_paths: folders; the one that holds the project's configurations and that folder itself are added.
      either: {required macro: macro that does instead}.

    Raises:
      ValueError: for what the user wrote, with the place and what to write instead.
    """
    paths = [*search_paths, str(CONFIGS.parent), str(CONFIGS)]
    written = _Written()
    for file in files:
        written.read_file(file, paths)
    for binding in bindings:
        written.read_binding(binding)
    _check_macros(written)

    gin.clear_config()
    # gin can add search paths and readers but not replace them, and its own log every folder without the file.
    gin.config._FILE_READERS[:] = [(lambda file: find(file, paths).open(), lambda file: True)]
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
        for macro, instead in (either or {}).items():
            if macro in _required(written) and gin.query_parameter(f"%{instead}") is not None:
                gin.bind_parameter((macro, "gin.macro", "value"), None)
        _check_required(written, either or {})
        gin.finalize()
    except (ImportError, AttributeError) as error:  # of an `import` in a gin file
        raise ValueError(str(error)) from error


def resolve(stage: Callable[..., Any], *, name: str) -> Resolved:
    """The arguments that the parsed configuration binds for a registered stage."""
    try:
        arguments = gin.get_configurable(f"{stage.__module__}.{name}")()
    except ValueError as error:  # of what `@maker()` calls, to which gin adds where it was called
        raise ValueError(str(error).split("\n  In call to configurable")[0]) from error
    for parameter in inspect.signature(stage).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(
                f"{name}.{parameter.name} is not bound: give --gin_file=gin_configs/runs/{name}.gin first,"
                f" or --gin.{name}.{parameter.name}=..."
            )
    return Resolved(arguments=arguments, text=gin.operative_config_str())


def find(file: str, paths: Sequence[str]) -> pathlib.Path:
    """The first of the search paths that has the file."""
    for folder in ("", *paths):
        path = pathlib.Path(folder, file)
        if path.is_file():
            return path
    known = [path.relative_to(CONFIGS.parent).as_posix() for path in sorted(CONFIGS.rglob("*.gin"))]
    raise ValueError(
        f"There is no gin file {file!r} in the working directory or in {', '.join(map(repr, paths))}."
        f"{_nearest(file, known)} Add its folder with --gin_search_paths."
    )


# ---- what the user wrote, before gin makes anything of it ---------------------------------------------------------


class _Written(config_parser.ParserDelegate):
    """Every macro that some files and bindings define or use, with the places."""

    def __init__(self) -> None:
        self.defined: dict[str, str] = {}  # macro -> the last place that defines it
        self.used: dict[str, str] = {}  # macro -> the last place that uses it
        self.examples: dict[str, str] = {}  # what stands at %gin.REQUIRED -> the example beside it
        self._place = ""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        """gin's parser met `@name`: of no interest here."""

    def macro(self, macro_name: str) -> str:
        """gin's parser met `%name`."""
        self.used[macro_name] = self._place
        return f"%{macro_name}"

    def read_file(self, file: str, paths: Sequence[str]) -> None:
        path = find(file, paths)
        self._place = str(path)
        with path.open() as lines:
            try:
                for statement in config_parser.ConfigParser(lines, self):
                    if isinstance(statement, config_parser.IncludeStatement):
                        self.read_file(statement.filename, paths)
                    elif isinstance(statement, config_parser.BindingStatement):
                        self._add(statement, f"{path}:{statement.location.line_num}")
                    self._place = str(path)
            except SyntaxError as error:
                raise ValueError(f"{path} can't be read as gin: {_told(error)}") from error

    def read_binding(self, binding: str) -> None:
        name, equals, value = (part.strip() for part in binding.partition("="))
        flag = f"--gin.{name}={value}"
        self._place = flag
        if not equals or not name:
            raise ValueError(f"--gin_bindings={binding!r} is not of the form 'NAME = VALUE'.")
        try:
            for statement in config_parser.ConfigParser(binding, self):
                if isinstance(statement, config_parser.BindingStatement):
                    self._add(statement, flag)
        except SyntaxError as error:
            raise ValueError(
                f"{flag} is no gin value: {_told(error)}. A string needs quotes of its own inside the shell's:"
                f" --gin.{name}='{_quoted(value)}'"
            ) from error

    def _add(self, statement: config_parser.BindingStatement, place: str) -> None:
        name = "/".join(part for part in (statement.scope, statement.selector) if part)
        if statement.arg_name:
            name = f"{name}.{statement.arg_name}"
        else:
            self.defined[name] = place
        if statement.value == f"%{REQUIRED}":
            example = re.search(r"#\s*e\.g\.\s*(.+?)\s*$", statement.location.line_content)
            self.examples[name] = example.group(1) if example else ""


def _check_macros(written: _Written) -> None:
    """Raises ValueError for a macro that is defined and not used, or used and not defined."""
    for name, place in written.defined.items():
        if name not in written.used:
            raise ValueError(
                f"{place}: nothing uses a macro {name}.{_nearest(name, written.used)}"
                f" Known: {', '.join(sorted(set(written.used) - {REQUIRED}))}."
            )
    for name, place in written.used.items():
        if name not in written.defined and name != REQUIRED and not _is_constant(name):
            raise ValueError(f"{place}: nothing sets %{name}.{_nearest(name, written.defined)}")


def _check_required(written: _Written, either: Mapping[str, str]) -> None:
    """Raises ValueError that names everything still at %gin.REQUIRED."""
    missing = _required(written)
    if not missing:
        return
    lines = []
    for name in missing:
        example = written.examples[name]
        flag = f"  --gin.{name}='{example}'" if example else f"  --gin.{name}=..."
        lines.append(f"{flag}  (or {either[name]})" if name in either else flag)
    raise ValueError("Not set, and it must be. Give for example:\n" + "\n".join(lines))


def _required(written: _Written) -> list[str]:
    """The macros and parameters whose final value is %gin.REQUIRED, in the order of the files."""
    values = {
        name: gin.query_parameter(f"%{name}" if name in written.defined else name)
        for name in written.examples
    }
    return [
        name
        for name, value in values.items()
        if getattr(value, "scoped_selector", "") == f"{REQUIRED}/gin.constant"
    ]


def _is_constant(name: str) -> bool:
    try:
        gin.query_parameter(name)
    except ValueError:
        return False
    return True


# ---- registration -----------------------------------------------------------------------------------------------


@functools.cache
def _stage(stage: Callable[..., Any], name: str) -> None:
    def gather(**arguments: Any) -> dict[str, Any]:
        return arguments

    gather.__signature__ = inspect.signature(stage)  # what may be bound
    with gin.unlock_config():
        gin.external_configurable(gather, name=name, module=stage.__module__)


# ---- words ------------------------------------------------------------------------------------------------------


def _rewritten(argument: str) -> str:
    if not argument.startswith("--gin."):
        return argument
    name, equals, value = argument.removeprefix("--gin.").partition("=")
    if not equals:
        raise ValueError(f"{argument} lacks a value: write --gin.{name}=VALUE")
    return f"--gin_bindings={name} = {value}"


def _told(error: SyntaxError) -> str:
    """gin's SyntaxError in one line."""
    message = str(error.args[0]).split("\n")[0].strip().rstrip(".")
    message = re.sub("^malformed node.*", "Unable to parse value", message)
    location = error.args[1] if len(error.args) > 1 else None
    return f"{message} (line {location[1]}: {location[3].strip()})" if location else message


def _quoted(value: str) -> str:
    """What was meant by a value whose quotes the shell has eaten."""
    if value[:1] in ("[", "(") and value[-1:] in ("]", ")"):
        items: Iterator[str] = (item.strip().strip("'\"") for item in value[1:-1].split(","))
        return f"{value[0]}{', '.join(_quoted(item) for item in items if item)}{value[-1]}"
    return '"' + value.strip("'\"") + '"'


def _nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean A or B?`, or nothing."""
    by_folded = {each.lower(): each for each in known if each != REQUIRED}
    near = difflib.get_close_matches(name.lower(), by_folded, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(by_folded[each] for each in near)}?" if near else ""
