"""What chunks are packed with: how much comes out of a packed chunk, known before memory is taken for it.

tensorstore unpacks whatever it is given to the end, and a packed chunk of a megabyte can hold 32 GiB of zeros. So gzip, zlib and
bzip2 are unpacked here, no further than the chunk's size; of zstd and blosc, which Python does not bring, the frames'
headers tell how much can come out, and tensorstore is only given what they allow.

Formats: zstd RFC 8878; blosc https://github.com/Blosc/c-blosc (README_CHUNK_FORMAT).
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable

from merging.checkpoints.format import CheckpointError

# (offset, count) -> those bytes of a packed chunk.
Read = Callable[[int, int], bytes]

INFLATED = ("gzip", "zlib", "bz2")
KNOWN = (*INFLATED, "zstd", "blosc")

_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_BLOCK_BYTES = 128 << 10  # of a zstd block, unpacked
_REPEATED = 1  # the kind of block that is one byte, many times
# zstd's compressor ends blocks early where what it packs changes, every 8 KiB at the earliest, so that many blocks are told
# to hold up to 16 times as much as they do.
_EARLY = 16
_FEW_BYTES = 1 << 20  # not worth a refusal


def inflate(packing: str, data: bytes, nbytes: int, where: str) -> bytes:
    """`data` unpacked (one of INFLATED), which must give `nbytes` bytes: no more memory is taken than that."""
    machine = bz2.BZ2Decompressor() if packing == "bz2" else zlib.decompressobj(_WINDOWS[packing])
    try:
        found = machine.decompress(data, nbytes + 1)
    except (zlib.error, OSError) as error:
        raise _damaged(where, packing, error) from None
    if len(found) != nbytes or not machine.eof or machine.unused_data:
        told = f"more than {nbytes}" if len(found) > nbytes else len(found)
        raise CheckpointError(
            f"{where} unpacks to {told} bytes, wanted {nbytes} and nothing behind them; the file is truncated or damaged: "
            "write it again"
        )
    return found


_WINDOWS = {"gzip": 31, "zlib": 15}


def check(packing: str, read: Read, size: int, nbytes: int, where: str) -> None:
    """Raises CheckpointError where a chunk packed by zstd or blosc in `size` bytes may unpack to far more than `nbytes`."""
    limit = max(_FEW_BYTES, _EARLY * nbytes)
    if packing == "zstd":
        _check_zstd(read, size, limit, where)
    elif (found := _blosc_size(read, size, where)) != nbytes:
        raise CheckpointError(f"{where} unpacks to {found} bytes, wanted {nbytes}; write it again")


def _check_zstd(read: Read, size: int, limit: int, where: str) -> None:
    """By the headers of the blocks of all frames: each holds 128 KiB at most."""
    at, blocks = 0, 0

    def take(count: int) -> int:
        nonlocal at
        if at + count > size:
            raise _damaged(where, "zstd", f"it ends at byte {size}")
        at += count
        return int.from_bytes(read(at - count, count), "little")

    def count_block() -> None:
        nonlocal blocks
        blocks += 1
        if blocks * _BLOCK_BYTES > limit:
            raise CheckpointError(
                f"{where} may unpack to more than {limit} bytes, far more than the chunk has; do not trust this checkpoint"
            )

    while at < size:
        magic = take(4)
        if magic in _SKIPPABLE:
            count_block()
            skipped = take(4)
            at += skipped
            continue
        if magic != _ZSTD_MAGIC:
            raise _damaged(where, "zstd", f"0x{magic:08x} begins no frame")
        descriptor = take(1)
        is_whole = descriptor >> 5 & 1  # a single segment: the window's size is not told
        at += 1 - is_whole + (0, 1, 2, 4)[descriptor & 3]  # the dictionary's number
        at += (is_whole, 2, 4, 8)[descriptor >> 6]  # the content's size, which nothing keeps to
        is_last = False
        while not is_last:
            count_block()
            header = take(3)
            is_last = bool(header & 1)
            at += 1 if header >> 1 & 3 == _REPEATED else header >> 3
        at += 4 if descriptor & 4 else 0  # a checksum


def _blosc_size(read: Read, size: int, where: str) -> int:
    if size < 16:
        raise _damaged(where, "blosc", f"it ends at byte {size}")
    header = read(0, 16)
    if int.from_bytes(header[12:16], "little") != size:
        raise _damaged(where, "blosc", f"{size} bytes are not what its header says")
    return int.from_bytes(header[4:8], "little")


def _damaged(where: str, packing: str, why: object) -> CheckpointError:
    return CheckpointError(f"{where} is no {packing}: {why}; the file is damaged: write it again")
