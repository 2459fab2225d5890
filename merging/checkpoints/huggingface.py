"""What a Hugging Face folder holds beside arrays: which file holds which leaf, config, tokenizer.

What it promises: an index can only name files beside it (no path, no link out of the folder), and
a file that it names but that is missing is an error with a leaf it should hold; what makes weights
loadable goes along to a merged folder, whatever its format. What it leaves out: the arrays (`safetensors.py`), pickles
(never opened), remote code, and licences and model cards, which speak of another model.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from merging.checkpoints.format import CheckpointError, LeafSpec
from merging.checkpoints.safetensors_header import load_json, refuse, show
from merging.checkpoints.storage import is_own_file, leads_out, put_file, small_file

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Bytes: 1.4 million leaves of 70 bytes. Anything larger is no index.
_MAX_INDEX_BYTES = 100_000_000

# Files that go along with merged weights, *.py excepted.
_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers gives them."""
    if count == 1:
        return [MODEL_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def find_weights(folder: epath.Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files that make up a folder's model, sorted; and {leaf: file}.

    The latter is None where there is no index. Raises CheckpointError where the folder doesn't say
    which files to take, or where they are missing or lie elsewhere.
    """
    present = {entry.name for entry in folder.iterdir()}
    if INDEX_FILE not in present:
        return [_only_file(folder, present)], None
    weight_map = _read_weight_map(folder / INDEX_FILE)
    files = sorted(set(weight_map.values()))
    if MODEL_FILE in present and files != [MODEL_FILE]:
        raise CheckpointError(
            f"{folder}: holds {MODEL_FILE} and also an index of {len(files)} other shards; remove "
            f"the one that is stale, or give the path of {MODEL_FILE}"
        )
    _check_shards(folder, weight_map, present)
    return files, weight_map


def index_json(shards: Sequence[Sequence[str]], specs: Mapping[str, LeafSpec]) -> bytes:
    """The index of these shards, as transformers writes it."""
    files = shard_names(len(shards))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def read_config(folder: epath.Path | None) -> dict[str, Any]:
    """What a folder's config.json says of the model; {} where there is none."""
    if folder is None or not (folder / "config.json").exists():
        return {}
    path = folder / "config.json"
    return load_json(small_file(path), str(path))


def carried_files(
    folder: epath.PathLike | None, config_dtype: str | None
) -> dict[str, epath.Path | bytes]:
    """{name: where to copy it from, or its content} of the files that go along with weights.

    `config_dtype` is what config.json shall say of the weights' type; None leaves it as it is.
    """
    if folder is None:
        return {}
    folder = epath.Path(folder)
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _CARRIED)
        and not entry.name.endswith(".py")
        and not entry.is_dir()
    )
    refuse(
        folder,
        [
            f"{name} is a link out of the folder, or no regular file"
            for name in names
            if not is_own_file(folder / name)
        ],
        "copy these files into the folder, or remove them",
    )
    carried: dict[str, epath.Path | bytes] = {name: folder / name for name in names}
    if config_dtype is not None and "config.json" in carried:
        config = read_config(folder)
        if not _set_dtype(config, config_dtype):
            config["torch_dtype"] = config_dtype
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        try:
            carried["config.json"] = text.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{folder / 'config.json'} spells what is not Unicode text: {error}"
            ) from None
    return carried


def put_carried(folder: epath.Path, carried: Mapping[str, epath.Path | bytes]) -> None:
    """Puts what `carried_files` found into another folder, each file whole."""
    for name, content in carried.items():
        put_file(folder / name, content if isinstance(content, bytes) else content.read_bytes())


def _only_file(folder: epath.Path, present: set[str]) -> str:
    files = sorted(name for name in present if name.endswith(".safetensors"))
    if MODEL_FILE in files:
        files = [MODEL_FILE]
    if len(files) != 1:
        raise CheckpointError(
            f"{folder}: found {show(files) if files else 'no file ending in .safetensors'}; wanted "
            f"{MODEL_FILE}, or {INDEX_FILE} and the shards it names, or exactly one .safetensors "
            "file (pickles such as pytorch_model.bin are never loaded: save the model again with "
            "safe_serialization=True)"
        )
    if leads_out(folder / files[0]):
        raise CheckpointError(
            f"{folder / files[0]} is a link to {os.path.realpath(folder / files[0])}: give that path, or copy the file"
        )
    return files[0]


def _read_weight_map(path: epath.Path) -> dict[str, str]:
    """{leaf: file} of an index; CheckpointError where it isn't that, or names a path."""
    tree = load_json(small_file(path, _MAX_INDEX_BYTES), str(path))
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {show(weight_map)}, wanted files by leaf")
    problems = [
        f"leaf {show(name)}: file is {show(file)}, wanted a plain name in the same folder"
        for name, file in weight_map.items()
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0")
    ]
    refuse(path, problems, "an index may only name files beside it; do not trust this checkpoint")
    return weight_map


def _check_shards(folder: epath.Path, weight_map: Mapping[str, str], present: set[str]) -> None:
    """Every shard has to be there, and be no link that leads out of the folder."""
    one_leaf = {file: name for name, file in reversed(weight_map.items())}
    problems = []
    for file, name in sorted(one_leaf.items()):
        if file not in present:
            problems.append(f"shard {show(file)} is missing; it holds leaf {show(name)}, for one")
        elif leads_out(folder / file):
            problems.append(f"shard {file} is a link to {os.path.realpath(folder / file)}")
    refuse(
        folder,
        problems,
        "every shard of the index must lie in its folder: fetch or copy what is missing or linked",
    )


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Sets the weights' type here and in the configs of parts (`text_config`); whether here."""
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            _set_dtype(value, dtype)
    keys = [key for key in ("torch_dtype", "dtype") if key in config]
    config.update(dict.fromkeys(keys, dtype))
    return bool(keys)
