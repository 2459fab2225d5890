"""LayoutReader: any box of any leaf, its reads of the source, threads, bounds."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.checkpoints import memory
from merging.checkpoints.format import Index, LeafSpec, Reader
from merging.checkpoints.layout_reader import LayoutReader, arranged
from merging.checkpoints.layouts import Layout, Rule
from merging.checkpoints.tiles import RUN_BYTES, Tiles
from tests.merging.checkpoints.test_layouts import LLAMA, llama, made_of, rules_and_shapes, tree


class Counting:
    """A reader that notes what is read from another."""

    format = "memory"
    location = "counting"

    def __init__(self, reader: Reader, *, fail_first: bool = False):
        self.reader, self.fail = reader, fail_first
        self.boxes: list[tuple[str, Index]] = []
        self.lock = threading.Lock()

    def specs(self) -> Mapping[str, LeafSpec]:
        return self.reader.specs()

    def read(self, name: str, index: Index, *, out: np.ndarray | None = None) -> np.ndarray:
        with self.lock:
            self.boxes.append((name, index))
            fails, self.fail = self.fail, False
        if fails:
            raise OSError("the disk is gone")
        return self.reader.read(name, index, out=out)

    @property
    def elements(self) -> int:
        return sum(int(np.prod([s.stop - s.start for s in box])) for _, box in self.boxes)

    def digest(self) -> str:
        return self.reader.digest()

    def check_unchanged(self) -> None:
        self.reader.check_unchanged()

    def close(self) -> None:
        self.reader.close()


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Index:
    return tuple(slice(*sorted(int(i) for i in rng.integers(0, n + 1, 2))) for n in shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules_and_shapes(), st.integers(0, 99))
def test_any_box_is_that_of_the_whole(
    drawn: tuple[dict[str, object], dict[str, tuple[int, ...]]], seed: int
):
    made, arrays = made_of(**drawn[0]), tree(drawn[1])
    whole = arranged(made, arrays)
    reader = LayoutReader(memory.Reader(arrays), made)
    rng = np.random.default_rng(seed)
    for name, spec in reader.specs().items():
        box = random_box(rng, spec.shape)
        np.testing.assert_array_equal(reader.read(name, box), whole[name][box])


TRANSPOSED = Layout(
    name="transposed",
    rules=(Rule("l.{layer}", "w", "(heads dim) embed -> embed layer heads dim"),),
    sizes={"heads": 8},
)


@pytest.fixture(scope="module")
def wide() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"l.{i}": rng.normal(size=(256, 6000)).astype(ml_dtypes.bfloat16) for i in range(2)}


@pytest.mark.parametrize("buffer_bytes", [64 << 20, 3 << 20, 1 << 20, 1 << 12])
def test_transposed_boxes_from_many_threads(wide: dict[str, np.ndarray], buffer_bytes: int):
    counting = Counting(memory.Reader(wide))
    reader = LayoutReader(counting, TRANSPOSED, buffer_bytes=buffer_bytes)
    whole = arranged(TRANSPOSED, wide)["w"]
    boxes = [
        (slice(i, min(i + 50, 6000)), slice(layer, layer + 1), slice(0, 8), slice(0, 32))
        for i in range(0, 6000, 50)
        for layer in range(2)
    ]

    def read(box: Index) -> None:
        out = np.empty([s.stop - s.start for s in box], whole.dtype)
        assert reader.read("w", box, out=out) is out
        assert out.tobytes() == whole[box].tobytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, boxes))
    if buffer_bytes >= 3 << 20:
        # Long runs, read about once, though each box by itself has runs of 100 bytes.
        assert len(counting.boxes) < 20 if buffer_bytes > 8 << 20 else len(counting.boxes) < 60
        assert counting.elements < 1.5 * whole.size or buffer_bytes < 8 << 20


def test_tiles_stay_within_their_bound(wide: dict[str, np.ndarray]):
    tiles = Tiles(memory.Reader(wide), nbytes=3 << 20)
    peak = 0

    def read(start: int) -> None:
        nonlocal peak
        box = (slice(0, 256), slice(start, start + 10))
        with tiles.read("l.0", box) as array:
            peak = max(peak, tiles._held)
            assert array.tobytes() == wide["l.0"][box].tobytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, np.random.default_rng(0).permutation(5990)[:300].tolist()))
    assert RUN_BYTES * 256 <= peak <= 3 << 20


def test_a_tile_that_failed_is_read_again(wide: dict[str, np.ndarray]):
    counting = Counting(memory.Reader(wide), fail_first=True)
    tiles = Tiles(counting, nbytes=8 << 20)
    box = (slice(0, 256), slice(3, 5))
    with pytest.raises(OSError, match="the disk is gone"), tiles.read("l.0", box):
        pass
    with tiles.read("l.0", box) as array:
        assert array.tobytes() == wide["l.0"][box].tobytes()


def test_boxes_in_the_source_s_order_are_read_as_they_are():
    counting = Counting(memory.Reader(llama()))
    reader = LayoutReader(counting, LLAMA)
    reader.read("token_embedder/embedding", (slice(2, 4), slice(1, 3)))
    reader.read("decoder/layers/norm/scale", (slice(1, 2), slice(0, 5)))
    assert counting.boxes == [
        ("model.embed_tokens.weight", (slice(2, 4), slice(1, 3))),
        ("model.layers.1.input_layernorm.weight", (slice(0, 5),)),
    ]


def test_layouts_compose():
    arrays = llama()
    back = LayoutReader(LayoutReader(memory.Reader(arrays), LLAMA), LLAMA.inverse())
    assert set(back.specs()) == set(arrays)
    for name, spec in back.specs().items():
        index = tuple(slice(0, n) for n in spec.shape)
        np.testing.assert_array_equal(back.read(name, index), arrays[name])


def test_the_digest_tells_layouts_apart():
    reader = memory.Reader({"a": np.zeros(2)})
    names = [
        LayoutReader(reader, Layout(name="x", rules=(Rule("a", to),))).digest() for to in "bbc"
    ]
    assert names[0] == names[1] != names[2]
    assert isinstance(LayoutReader(reader, Layout(name="x", rules=(Rule("a", "b"),))), Reader)


def test_out_of_another_shape_is_refused():
    reader = LayoutReader(memory.Reader(llama()), LLAMA)
    with pytest.raises(ValueError, match="C-contiguous"):
        reader.read("decoder/final_norm/scale", (slice(0, 5),), out=np.zeros(4, np.float32))
