"""Where an OCDBT database keeps the value of each key: file, offset and length, so that values are read by range.

Format: https://google.github.io/tensorstore/kvstore/ocdbt (a manifest names the root of a B+tree; its leaves hold small values,
or refer to ranges of data files). tensorstore decodes manifest and nodes; what they refer to is checked to lie within the
folder before it is followed, since a reference is a path, and a path in a file can be anything.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from merging.checkpoints import codecs
from merging.checkpoints.folder import Blob, Folder
from merging.checkpoints.format import CheckpointError
from merging.checkpoints.safetensors_header import show

MANIFEST = "manifest.ocdbt"

# A manifest holds at most 16 versions; a node is at most 100 MB decoded where Orbax wrote it.
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_NODE_BYTES = 100 << 20
_MAX_NODES = 1 << 20
# Manifests and nodes are packed by zstd: what may come out is 16 times this where blocks are small, so 256 MiB.
_UNPACKED_BYTES = 16 << 20
_LOCATION = re.compile(r"(value|btreenode):([^:]*):([^:]*):(\d{1,18}):(\d{1,18})")


def kvstore(folder: Folder | str) -> dict[str, Any]:
    """tensorstore's name for a folder of files."""
    path = str(folder.path if isinstance(folder, Folder) else folder)
    if path.startswith("gs://"):
        bucket, _, inside = path.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}
    return {"driver": "file", "path": f"{path}/"}


def entries(folder: Folder) -> Mapping[str, Blob]:
    """Every key and where its value lies. Raises CheckpointError for a database that is damaged or leaves its folder."""
    import tensorstore as ts

    where = f"{folder.path / MANIFEST}"
    if folder.files[MANIFEST].size > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{where}: {folder.files[MANIFEST].size} bytes are no manifest")
    _check_packing(folder, Blob(folder.files[MANIFEST].size, MANIFEST))
    base = ts.KvStore.open(kvstore(folder)).result()

    def dump(location: str | None) -> Any:
        try:
            return ts.ocdbt.dump(base, location).result()
        except ValueError as error:
            raise CheckpointError(f"{where}: the database is damaged: {error}") from None

    manifest = dump(None)
    if not manifest.get("versions"):
        raise CheckpointError(f"{where}: the database has no version: it was never committed")
    root = manifest["versions"][-1]["root"]
    found: dict[str, Blob] = {}
    waiting = [(root["location"], b"", None)] if "location" in root else []
    seen = 0
    while waiting:
        location, prefix, height = waiting.pop()
        seen += 1
        if seen > _MAX_NODES:
            raise CheckpointError(f"{where}: more than {_MAX_NODES} nodes: the database is damaged")
        blob = _blob(folder, location, "btreenode")
        if blob.nbytes > _MAX_NODE_BYTES:
            raise CheckpointError(f"{where}: node {show(location)} is too large to be one")
        _check_packing(folder, blob)
        node = dump(location)
        if height is not None and node["height"] != height:  # so that no tree leads in a circle
            raise CheckpointError(
                f"{where}: node {show(location)} has another height than its place"
            )
        for entry in node["entries"]:
            key = prefix + entry["key"]
            if "subtree_common_prefix" in entry:
                child = prefix + entry["subtree_common_prefix"]
                waiting.append((entry["location"], child, node["height"] - 1))
            elif "inline_value" in entry:
                value = entry["inline_value"]
                found[_text(key, where)] = Blob(len(value), inline=value)
            else:
                found[_text(key, where)] = _blob(folder, entry["indirect_value"], "value")
    return found


def _check_packing(folder: Folder, blob: Blob) -> None:
    """Raises CheckpointError where a manifest or node may unpack to more than memory should be taken for."""
    start = folder.read(blob.part(0, min(blob.nbytes, 32)))[12:]  # behind magic and length
    numbers = re.match(
        rb"[\x80-\xff]*[\x00-\x7f]([\x80-\xff]*[\x00-\x7f])", start
    )  # version, packing
    if numbers and numbers[1][0] & 0x7F == 1:  # else tensorstore says what is wrong, if anything is
        begin = 12 + numbers.end()
        codecs.check(
            "zstd",
            lambda offset, count: folder.read(blob.part(begin + offset, count)),
            blob.nbytes - begin - 4,  # a checksum
            _UNPACKED_BYTES,
            f"{folder.path / blob.file}: byte {blob.offset}: a part of the database",
        )


def _blob(folder: Folder, location: str, kind: str) -> Blob:
    """A reference `kind:base:file:offset:length`, both paths percent-encoded, checked against the folder."""
    match = _LOCATION.fullmatch(location)
    if not match or match[1] != kind:
        raise CheckpointError(
            f"{folder.path / MANIFEST}: {show(location)} is no reference to a {kind}"
        )
    file = urllib.parse.unquote(match[2]) + urllib.parse.unquote(match[3])
    offset, nbytes = int(match[4]), int(match[5])
    if file not in folder.files:
        raise CheckpointError(
            f"{folder.path / MANIFEST}: refers to {show(file)}, which is no file of this folder; copy the checkpoint "
            "with all its files"
        )
    if offset + nbytes > folder.files[file].size:
        raise CheckpointError(
            f"{folder.path / file}: {folder.files[file].size} bytes, the database refers to {offset + nbytes}; the "
            "file is truncated: fetch or write it again"
        )
    return Blob(nbytes, file, offset)


def _text(key: bytes, where: str) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: key {show(key)} is not UTF-8") from None
