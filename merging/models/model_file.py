"""model.json: what lies beside parameters so that nobody has to say which model they are of.

  {"version": 1, "family": "palm", "sizes": {"vocab_size": 1024, ...}, "stacked": {"layers": 0},
   "vocabulary": {"name": "miniature", "digest": "5f...", "files": []}}

Sizes are the configuration's fields, without what one run chooses for itself (`dropout_rate`, `remat`). A vocabulary is known by its
name and a digest of what it makes of text; where it is files, they lie beside model.json. A Hugging Face folder has none: its
config.json and tokenizer.json say the same, and `describe` reads either.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from merging.checkpoints.format import CheckpointError
from merging.checkpoints.huggingface import carried_files
from merging.checkpoints.safetensors_header import load_json, refuse, show
from merging.checkpoints.storage import is_own_file, put_file, small_file
from merging.models import huggingface
from merging.models.config import DecoderConfig
from merging.models.families import FAMILIES, family_of

FILE = "model.json"
VERSION = 1

TOKENIZER_FILE = "tokenizer.json"

_CHOSEN_BY_RUNS = ("dropout_rate", "remat")
# What JSON has for the types of fields; of others (tuples of names) the configuration itself sees to it.
_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
_TYPES["int | None"] = (int, type(None))
# What a file may leave unsaid.
_OPTIONAL = ("max_positions",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a model's tokens mean; plain data, since the library reads no text.

    Attributes:
      name: as the tasks know it ("bytes", "miniature"), or the name of one of the files ("tokenizer.json").
      digest: changes with whatever changes the tokens of a text; None where nobody has computed it.
      files: by name, where each lies; they go along with the parameters.
    """

    name: str
    digest: str | None = None
    files: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> epath.Path | None:
        """The file that is the vocabulary, where it is one."""
        return self.files.get(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFile:
    """What a model.json says.

    Attributes:
      config: of the model.
      stacked: {pattern of leaf paths: axis over layers}, see `paths.Stacked`.
      vocabulary: of its tokens; None where it isn't known.
    """

    config: DecoderConfig
    stacked: Mapping[str, int]
    vocabulary: Vocabulary | None = None


def stacked_of(config: DecoderConfig) -> dict[str, int]:
    """Which leaves of a model's own tree are stacked, and along which axis."""
    return {"layers": 0} if config.scan_layers else {}


def write(
    folder: epath.PathLike,
    config: DecoderConfig,
    stacked: Mapping[str, int],
    vocabulary: Vocabulary | None,
) -> None:
    """Puts model.json and the vocabulary's files into a folder, in place of older ones."""
    folder = epath.Path(folder)
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in _CHOSEN_BY_RUNS}
    described: dict[str, Any] = {
        "version": VERSION,
        "family": family_of(config),
        "sizes": sizes,
        "stacked": dict(stacked),
        "vocabulary": None,
    }
    if vocabulary is not None:
        described["vocabulary"] = {
            "name": vocabulary.name,
            "digest": vocabulary.digest,
            "files": sorted(vocabulary.files),
        }
        for name, path in vocabulary.files.items():
            put_file(folder / name, epath.Path(path).read_bytes())
    put_file(folder / FILE, (json.dumps(described, indent=1) + "\n").encode())


def read(folder: epath.PathLike, **changes: Any) -> ModelFile:
    """What a folder's model.json says; `changes` are fields of the configuration, such as `dropout_rate`.

    Raises CheckpointError where there is none, or where it says what isn't known here.
    """
    path = epath.Path(folder) / FILE
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist, which says what model a checkpoint is of: give the model (MODEL) and its vocabulary"
            " (VOCABULARY)"
        )
    described = load_json(small_file(path), str(path))
    version = described.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{path}: version is {show(version)}, wanted {VERSION}")
    wanted = ("family", "sizes", "stacked", "vocabulary")
    problems = [f"{key} is missing" for key in wanted if key not in described]
    problems += [f"{key} is unknown" for key in described if key not in wanted]
    refuse(path, problems, "it was written by another version of this program, or changed")
    stacked = described["stacked"]
    if not isinstance(stacked, dict) or not all(type(axis) is int for axis in stacked.values()):
        raise CheckpointError(f"{path}: stacked is {show(stacked)}, wanted {{pattern: axis}}")
    return ModelFile(
        config=_config(described["family"], described["sizes"], changes, where=str(path)),
        stacked=stacked,
        vocabulary=_vocabulary(described["vocabulary"], path),
    )


def read_if_there(folder: epath.PathLike) -> ModelFile | None:
    """What a folder's model.json says; None where there is none. Errors as `read`."""
    return read(folder) if (epath.Path(folder) / FILE).exists() else None


def write_along(
    folder: epath.PathLike, described: ModelFile, *, dtype: str | None, stacked: Mapping[str, int]
) -> None:
    """Puts a model.json beside parameters that were made of others: in another type (None: the same) or stacked otherwise."""
    changes = {} if dtype is None else {"param_dtype": dtype}
    config = dataclasses.replace(described.config, **changes)
    write(folder, config, stacked, described.vocabulary)


def is_described(folder: epath.PathLike) -> bool:
    """Whether a folder holds what `describe` reads."""
    folder = epath.Path(folder)
    return folder.is_dir() and any((folder / name).exists() for name in (FILE, "config.json"))


def describe(folder: epath.PathLike, **changes: Any) -> ModelFile:
    """The same of any folder that says it: ours by model.json, a Hugging Face one by config.json and tokenizer.json.

    Raises CheckpointError where the folder has neither, and as `read` and `huggingface.read_config` do.
    """
    folder = epath.Path(folder)
    if (folder / FILE).exists() or not (folder / "config.json").exists():
        return read(folder, **changes)
    config = huggingface.read_config(folder, **changes)
    return ModelFile(
        config=config,
        stacked={},  # of the stored leaves, one a layer
        vocabulary=vocabulary_of_files(folder),
    )


def vocabulary_of_files(folder: epath.PathLike, *, digest: str | None = None) -> Vocabulary | None:
    """The vocabulary of a Hugging Face folder, with the files beside its tokenizer.json; None without one."""
    folder = epath.Path(folder)
    if not (folder / TOKENIZER_FILE).exists():
        return None
    files = {name: folder / name for name in carried_files(folder, None)}
    return Vocabulary(name=TOKENIZER_FILE, digest=digest, files=files)


def _config(family: Any, sizes: Any, changes: Mapping[str, Any], *, where: str) -> DecoderConfig:
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{where}: family is {show(family)}; there are {', '.join(FAMILIES)}")
    if not isinstance(sizes, dict):
        raise CheckpointError(
            f"{where}: sizes are {show(sizes)}, wanted the fields of a configuration"
        )
    kind = FAMILIES[family][0]
    types = {f.name: f.type for f in dataclasses.fields(kind) if f.name not in _CHOSEN_BY_RUNS}
    known = types.keys()
    problems = [f"sizes: {name} is missing" for name in sorted(known - sizes.keys() - {*_OPTIONAL})]
    problems += [f"sizes: {name} is unknown to {family}" for name in sorted(sizes.keys() - known)]
    problems += [
        f"sizes: {name} is {show(value)}, wanted {types[name]}"
        for name, value in sizes.items()
        if type(value) not in _TYPES.get(types.get(name), (type(value),))
    ]
    refuse(where, problems, "it was written by another version of this program, or changed")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    try:
        return kind(**fields | changes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _vocabulary(described: Any, path: epath.Path) -> Vocabulary | None:
    if described is None:
        return None
    if not isinstance(described, dict) or described.keys() != {"name", "digest", "files"}:
        raise CheckpointError(
            f"{path}: vocabulary is {show(described)}, wanted a name, a digest and files"
        )
    name, names = described["name"], described["files"]
    if not isinstance(names, list) or not all(isinstance(text, str) for text in (name, *names)):
        raise CheckpointError(f"{path}: vocabulary is {show(described)}, wanted names")
    files = {name: path.parent / name for name in names}
    missing = [
        f"{show(name)} is not there"
        for name, file in files.items()
        if "/" in name or not is_own_file(file)
    ]
    refuse(path, missing, "the vocabulary's files must lie beside it: fetch or copy them")
    return Vocabulary(name=name, digest=described["digest"], files=files)
