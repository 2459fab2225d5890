"""Statistical campaign on DARE's keep masks: are they as good as independent coin flips?

    JAX_PLATFORMS=cpu python -m tests.campaigns.masks --draws=2**30 --seeds=16

Every number is a z score: how many standard deviations a count lies from what independent draws would give. A family
of at most 1,000 scores must stay within 4 sigma each; a larger one within the Bonferroni bound at which a family of
good masks fails once in a hundred campaigns. Keys and indices are fixed, so a campaign gives the same table every time.
The command prints the table and exits with 1 if any score is out.

`draws` is the number of draws behind each score (a pair of streams has so many pairs of draws). 2^30 take five minutes on
one core and 0.3 GiB; the tests run the same functions with 2^20.

Under one key, indices below 2^32 give 2^32 different draws, so a tensor's kept share is that of a sample without
replacement, a little closer to the density than coin flips are. Variances are corrected for that (`_finite`): without
it, too close would pass unseen.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32, UInt64

from merging.kernels import masks
from merging.kernels.element_index import element_index

DENSITIES = (0.1, 0.5, 0.9)
SIGMAS = 4.0
FAMILY_LIMIT = (
    1_000  # scores above which 4 sigma would fail good masks too often (more than once in 16)
)
FAMILY_ALPHA = 0.01  # share of good campaigns in which a larger family would still fail
BLOCK = (
    2**20
)  # draws in memory at once: planes of 32 bits of it are 4 MiB, and loop overheads are below a percent

# Names as they stand in checkpoints: they differ in one digit, one part, or nothing but order.
PATHS = (
    "decoder/layers/0/mlp/wi/kernel",
    "decoder/layers/0/mlp/wo/kernel",
    "decoder/layers/1/mlp/wi/kernel",
    "decoder/layers/2/mlp/wi/kernel",
    "decoder/layers/10/mlp/wi/kernel",
    "decoder/layers/0/attention/query/kernel",
    "token_embedder/embedding",
    "",
)
EXPERTS = 8
LAGS = (1, 2, 3)
POWERS = tuple(2**k for k in range(1, 21))

Hash = Callable[[Array, Array, Array, Array | None], Array]


class Stream(NamedTuple):
    """The draws of one tensor of one expert at indices offset, offset + stride, ..."""

    seed: int = 0
    expert: int = 0
    path: str = PATHS[0]
    offset: int = 0
    stride: int = 1


class Score(NamedTuple):
    """One z score and what it is of."""

    what: str
    z: float


class Family(NamedTuple):
    """Scores that are judged together."""

    name: str
    scores: tuple[Score, ...]

    @property
    def bound(self) -> float:
        """The largest |z| allowed."""
        if len(self.scores) <= FAMILY_LIMIT:
            return SIGMAS
        return -statistics.NormalDist().inv_cdf(FAMILY_ALPHA / len(self.scores) / 2)

    @property
    def worst(self) -> Score:
        return max(self.scores, key=lambda score: abs(score.z))

    @property
    def spread(self) -> float:
        """Root mean square of the scores: near 1 if the variances are right and the draws good."""
        return math.sqrt(sum(score.z**2 for score in self.scores) / len(self.scores))

    @property
    def passes(self) -> bool:
        return all(abs(score.z) <= self.bound for score in self.scores)


def run(draws: int, *, seeds: int, hash32: Hash = masks.hash32) -> Iterator[Family]:
    """All families, one after the other.

    Args:
      draws: behind each score; a power of two from 2^16.
      seeds: 0 to seeds - 1 are compared with each other.
      hash32: what is tested; the tests put a bad one here to see it fail.
    """
    if draws < 2**16 or draws & (draws - 1):
        raise ValueError(f"draws is {draws}: give a power of two from 2**16, as in 2**30")
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}: give at least 2, whose masks can be compared")
    share = functools.partial(_kept_share_and_correlations, draws=draws, hash32=hash32)
    groups = {  # name: (streams, whether all pairs are compared or each stream with the first)
        "experts": ({f"expert {i}": Stream(expert=i) for i in range(EXPERTS)}, True),
        "leaves": ({path or "(root)": Stream(path=path) for path in PATHS}, True),
        "seeds": ({f"seed {seed}": Stream(seed=seed) for seed in range(seeds)}, True),
        "flipped seed bits": (
            {"seed 0": Stream()} | {f"seed bit {bit}": Stream(seed=1 << bit) for bit in range(64)},
            False,
        ),
        "neighbours": ({f"lag {lag}": Stream(offset=lag) for lag in (0, *LAGS)}, False),
        "power-of-two lags": (
            {f"lag {lag}": Stream(offset=lag) for lag in (0, *POWERS, 2**31, 2**32, 2**40)},
            False,
        ),
        "power-of-two strides": (
            {f"stride {stride}": Stream(stride=stride) for stride in POWERS},
            True,
        ),
    }
    for name, (streams, all_pairs) in groups.items():
        yield from share(name, streams, all_pairs=all_pairs)
    yield from _bits(draws=draws, hash32=hash32)
    yield _words(draws=draws, hash32=hash32)


# ---- the families ------------------------------------------------------------------------------------------------


def _kept_share_and_correlations(
    name: str, streams: dict[str, Stream], *, all_pairs: bool, draws: int, hash32: Hash
) -> Iterator[Family]:
    """The kept share of each stream at each density, and the correlation of masks at one density between streams."""
    names = list(streams)
    pairs = [(a, b) for a, b in itertools.combinations(range(len(names)), 2) if all_pairs or a == 0]
    kept = np.zeros((len(names), len(DENSITIES)), np.int64)
    both = np.zeros((len(pairs), len(DENSITIES)), np.int64)
    for start in range(0, draws, BLOCK):
        planes = [_kept(stream, start, draws, hash32) for stream in streams.values()]
        kept += [_ones(plane) for plane in planes]
        both += [_ones(planes[a] & planes[b]) for a, b in pairs]

    shares, correlations = [], []
    for d, density in enumerate(DENSITIES):
        chance = (int(masks.keep_limit(np.float32(density))) + 1) / 2**32
        for s, stream in enumerate(streams.values()):
            variance = draws * chance * (1 - chance) * _finite(stream, draws)
            z = (int(kept[s, d]) - draws * chance) / math.sqrt(variance)
            shares.append(Score(f"{names[s]}, density {density}", z))
        for p, (a, b) in enumerate(pairs):
            z = _correlation(int(kept[a, d]), int(kept[b, d]), int(both[p, d]), draws)
            correlations.append(Score(f"{names[a]} with {names[b]}, density {density}", z))
    if len({stream._replace(offset=0) for stream in streams.values()}) > 1:  # else it is one score
        yield Family(f"kept share: {name}", tuple(shares))
    yield Family(f"correlation: {name}", tuple(correlations))


def _bits(*, draws: int, hash32: Hash) -> Iterator[Family]:
    """Balance of the 32 bits of a draw, and their correlations with each other and with the next draw's bits."""
    stream, following = Stream(), Stream(offset=1)
    within = list(itertools.combinations(range(32), 2))
    across = list(itertools.product(range(32), repeat=2))
    ones = np.zeros((2, 32), np.int64)
    both = np.zeros(len(within) + len(across), np.int64)
    for start in range(0, draws, BLOCK):
        here, there = (_bit_planes(s, start, draws, hash32) for s in (stream, following))
        ones += [_ones(here), _ones(there)]
        both[: len(within)] += [int(_ones(here[a] & here[b])) for a, b in within]
        both[len(within) :] += [int(_ones(here[a] & there[b])) for a, b in across]

    deviation = math.sqrt(draws / 4 * _finite(stream, draws))
    yield Family(
        "balance of output bits",
        tuple(Score(f"bit {b}", (int(ones[0, b]) - draws / 2) / deviation) for b in range(32)),
    )
    scores = [
        _correlation(int(ones[0, a]), int(ones[c, b]), int(n), draws)
        for (c, a, b), n in zip(
            [(0, *pair) for pair in within] + [(1, *pair) for pair in across], both, strict=True
        )
    ]
    yield Family(
        "correlation: bits of one draw",
        tuple(Score(f"bits {a}, {b}", z) for (a, b), z in zip(within, scores, strict=False)),
    )
    yield Family(
        "correlation: bits of draws i, i + 1",
        tuple(
            Score(f"bits {a}, {b}", z)
            for (a, b), z in zip(across, scores[len(within) :], strict=True)
        ),
    )


def _words(*, draws: int, hash32: Hash) -> Family:
    """Chi-square of the 16-bit halves of the draws, and of independence of two neighbours' highest bytes."""
    stream = Stream()
    low, high, serial = (np.zeros(2**16, np.int64) for _ in range(3))
    for start in range(0, draws, BLOCK):
        drawn = _draws(stream, start, draws, hash32)
        following = _draws(stream._replace(offset=1), start, draws, hash32)
        low += np.bincount(drawn & np.uint32(0xFFFF), minlength=2**16)
        high += np.bincount(drawn >> np.uint32(16), minlength=2**16)
        bytes_of_pair = (drawn >> np.uint32(24) << np.uint32(8)) | following >> np.uint32(24)
        serial += np.bincount(bytes_of_pair, minlength=2**16)

    finite = _finite(stream, draws)
    expected = draws / 2**16
    scores = []
    for what, counts in (("low 16 bits", low), ("high 16 bits", high)):
        chi_square = float(((counts - expected) ** 2).sum()) / expected / finite
        scores.append(Score(what, _chi_square_score(chi_square, 2**16 - 1)))
    table = serial.reshape(256, 256)
    margins = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / draws
    chi_square = float(((table - margins) ** 2 / np.maximum(margins, 1e-9)).sum())
    scores.append(
        Score("highest bytes of draws i and i + 1", _chi_square_score(chi_square, 255**2))
    )
    return Family("chi-square of 16-bit words", tuple(scores))


# ---- counting ----------------------------------------------------------------------------------------------------


def _ones(planes: UInt64[np.ndarray, "*rows words"]) -> np.ndarray:
    """Set bits of each row: int64 [*rows]."""
    return np.bitwise_count(planes).sum(-1, dtype=np.int64)


def _correlation(ones_a: int, ones_b: int, both: int, draws: int) -> float:
    """Sample correlation of two bit streams, in units of its deviation under independence, 1 / sqrt(draws)."""
    a, b = ones_a / draws, ones_b / draws
    variance = a * (1 - a) * b * (1 - b)
    if not variance:
        return math.inf  # a bit that never changes
    return math.sqrt(draws) * (both / draws - a * b) / math.sqrt(variance)


def _chi_square_score(chi_square: float, freedom: int) -> float:
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def _finite(stream: Stream, draws: int) -> float:
    """Share of the binomial variance that is left, as draws of one key and one high index word never repeat."""
    return 1 - min(draws, 2**32 // stream.stride) / 2**32


# ---- drawing -----------------------------------------------------------------------------------------------------


def _kept(stream: Stream, start: int, draws: int, hash32: Hash) -> UInt64[np.ndarray, "3 words"]:
    """Masks of a block of the stream at each density, 64 draws a word."""
    limits = masks.keep_limit(jnp.asarray(DENSITIES, jnp.float32))
    return np.asarray(
        _kept_block(*_arguments(stream, start), limits, **_sizes(stream, draws, hash32))
    ).view(np.uint64)


def _bit_planes(
    stream: Stream, start: int, draws: int, hash32: Hash
) -> UInt64[np.ndarray, "32 words"]:
    """The 32 bits of a block of draws, 64 draws a word."""
    return np.asarray(_bit_block(*_arguments(stream, start), **_sizes(stream, draws, hash32))).view(
        np.uint64
    )


def _draws(stream: Stream, start: int, draws: int, hash32: Hash) -> UInt32[np.ndarray, " block"]:
    return np.asarray(_drawn(*_arguments(stream, start), **_sizes(stream, draws, hash32)))


def _arguments(stream: Stream, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Key words and the two index words of a block's first element."""
    first = stream.offset + start * stream.stride
    return (
        masks.tensor_key(seed=stream.seed, expert=stream.expert, path=stream.path),
        np.array([first & 0xFFFFFFFF, first >> 32], np.uint32),
    )


def _sizes(stream: Stream, draws: int, hash32: Hash) -> dict[str, int | bool | Hash]:
    """What a compiled block depends on."""
    last = stream.offset + draws * stream.stride
    return dict(count=min(draws, BLOCK), stride=stream.stride, wide=last > 2**32, hash32=hash32)


_block = functools.partial(jax.jit, static_argnames=("count", "stride", "wide", "hash32"))


@_block
def _drawn(
    key: UInt32[Array, "2"],
    first: UInt32[Array, "2"],
    *,
    count: int,
    stride: int,
    wide: bool,
    hash32: Hash,
) -> UInt32[Array, " count"]:
    index = element_index((count,), (stride,), (first[0], first[1]), wide=wide)
    return hash32(key[0], key[1], index.low, index.high)


@_block
def _kept_block(
    key: UInt32[Array, "2"], first: UInt32[Array, "2"], limits: UInt32[Array, " d"], **sizes
) -> Array:
    return _packed(_drawn(key, first, **sizes) <= limits[:, None])


@_block
def _bit_block(key: UInt32[Array, "2"], first: UInt32[Array, "2"], **sizes) -> Array:
    shifts = jnp.arange(32, dtype=jnp.uint32)[:, None]
    return _packed((_drawn(key, first, **sizes) >> shifts & jnp.uint32(1)) != 0)


def _packed(bits: Bool[Array, "rows count"]) -> Array:
    """8 bits a byte: uint8 [rows, count / 8]."""
    octets = bits.reshape(bits.shape[0], -1, 8).astype(jnp.uint8)
    return (octets << jnp.arange(8, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


# ---- the command -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=_power, default=2**30, help="behind each score, as 2**30")
    parser.add_argument("--seeds", type=int, default=16, help="seeds that are compared, from 0")
    options = parser.parse_args(arguments)

    print(f"{options.draws:,} draws behind each score, densities {DENSITIES}")
    print(f"{'family':38} {'scores':>6} {'bound':>6} {'rms z':>6} {'worst':>6}      of (seconds)")
    total, failed, clock = 0, [], time.monotonic()
    for family in run(options.draws, seeds=options.seeds):
        total += len(family.scores)
        failed += [] if family.passes else [family.name]
        seconds, clock = time.monotonic() - clock, time.monotonic()
        print(
            f"{family.name:38} {len(family.scores):6,} {family.bound:6.2f} {family.spread:6.2f}"
            f" {family.worst.z:+6.2f} {'ok  ' if family.passes else 'OUT '}"
            f" {family.worst.what} ({seconds:.0f})",
            flush=True,
        )
    print(f"{total:,} scores; out of bounds: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _power(text: str) -> int:
    """`2**30` or `1073741824`."""
    base, _, exponent = text.partition("**")
    return int(base) ** int(exponent or 1)


if __name__ == "__main__":
    sys.exit(main())
