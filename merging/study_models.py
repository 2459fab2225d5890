"""The models of one size and base: base and experts, and what is merged of them.

Where base and experts fit into memory together they are read once, and every merge is made there by `merge_params`. Where they don't,
every merge is streamed from disk to disk by `merge_checkpoints`, read, and its folder removed: the same numbers, bit for bit. So are merges
that are to be kept, whose folders stay.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from merging import manifest
from merging.checkpoints import open_checkpoint
from merging.engine import hosts
from merging.engine.resident import merge_params
from merging.grid import tuning
from merging.grid.cells import TUNED, Cell, subset
from merging.grid.study_file import BASE, MULTITASK, expert
from merging.merge import merge_checkpoints
from merging.methods.method import Method
from merging.models import model_file
from merging.models.config import DecoderConfig
from merging.models.parameters import read_params

if TYPE_CHECKING:
    from merging.study import Plan

# The share of the memory that base, experts and merges may fill; the rest is for evaluating.
SHARE_OF_MEMORY = 0.6

# At a merge that another worker is writing.
SECONDS_BETWEEN_LOOKS = 1.0


class StudyModels:
    """Base and experts, read when first asked for, and their merges.

    Args:
      planned: the study.
      size, base: whose.
      mesh: of devices.
      counted: (part of the study's seconds) -> a context whose time is added to it.
      judge: (config, parameters of a merge, categories of its experts) -> what a setting that is chosen makes high.
      judge_identity: () -> JSON that says all that the judge depends on.
      log: told in words.

    Attributes:
      config: of the models.
      streams: base and experts don't fit into memory together.
    """

    def __init__(
        self,
        planned: Plan,
        size: str,
        base: str,
        mesh: jax.sharding.Mesh,
        *,
        counted: Callable[[str], contextlib.AbstractContextManager[None]],
        judge: Callable[[DecoderConfig, Any, Sequence[str]], float],
        judge_identity: Callable[[], Mapping[str, Any]],
        log: Callable[[str], None] = lambda text: None,
    ):
        self.plan, self.size, self.base_name = planned, size, base
        self.folder = planned.base_folder(size, base)
        self.config = model_file.describe(self.folder).config
        self._mesh, self._counted, self._log = mesh, counted, log
        self._judge = functools.partial(judge, self.config)
        self._judge_identity = judge_identity
        self._merges = planned.merges(size, base)
        nbytes = self.config.num_params() * self.config.parameter_dtype.itemsize
        needed = nbytes * (len(planned.held_in) + 2)
        room = SHARE_OF_MEMORY * memory_bytes(mesh)
        resident = planned.settings.experts_in_memory
        self.streams = needed > room if resident is None else not resident
        if self.streams:
            log(
                f"{size}/{base}: base and {len(planned.held_in)} experts take {needed / 1e9:,.1f} GB of memory, and there are"
                f" {room / 1e9:,.1f} GB for them: merges are streamed from disk"
            )

    def read(self) -> None:
        """What stays in memory, now, so that no merge's time has the reading in it."""
        if not self.streams:
            _ = self.base, self.experts()

    @functools.cached_property
    def base(self) -> Any:
        """The base's parameters."""
        return self._read(self.folder)

    @functools.lru_cache(maxsize=1)  # merges of experts of fewer steps come behind the others  # noqa: B019
    def experts(self, steps: int | None = None) -> dict[str, Any]:
        """The parameters of all experts, by category; `steps` as in `Cell`."""
        return {each: self._read(self._expert(each, steps)) for each in self.plan.held_in}

    def params(self, model: str) -> Any:
        """The parameters of a model of this size and base."""
        if model == BASE:
            return self._read(self.folder) if self.streams else self.base
        if model == MULTITASK:
            return self._read(self.plan.places.multitask(self.size, self.base_name))
        if model in self._merges:
            cell = self._merges[model]
            keep = self.plan.settings.keep_merged
            return self.merged(
                self.method(cell),
                cell.categories,
                seed=cell.seed,
                steps=cell.steps,
                output=self.plan.places.merged(self.size, self.base_name, model) if keep else None,
            )
        category, steps = self._trained[model]
        if self.streams:
            return self._read(self._expert(category, steps))
        return self.experts(steps)[category]

    @functools.cached_property
    def _trained(self) -> dict[str, tuple[str, int | None]]:
        """The category and steps of each expert, by the name of its model."""
        return {
            expert(category, steps): (category, steps)
            for steps in self.plan.every_steps
            for category in self.plan.held_in
        }

    def method(self, cell: Cell) -> Method:
        """The cell's method: as the study gives it, or with the setting that was best."""
        fixed = self.plan.settings.methods[cell.method]
        return self._tuned(cell.method, cell.num_experts) if cell.setting == TUNED else fixed

    def merged(
        self,
        method: Method,
        categories: Sequence[str],
        *,
        seed: int,
        steps: int | None = None,
        output: epath.Path | None = None,
    ) -> Any:
        """The merge of some categories' experts; `output`: where it is to be kept."""
        if self.streams or output is not None:
            folders = [self._expert(category, steps) for category in categories]
            return self._streamed(method, folders, seed=seed, output=output)
        experts = self.experts(steps)
        with self._counted("merge"):
            merged = merge_params(
                self.base,
                [experts[category] for category in categories],
                method,
                seed=seed,
                stacked=model_file.stacked_of(self.config),
            )
            return jax.block_until_ready(merged)

    @functools.cache  # noqa: B019
    def _tuned(self, name: str, num_experts: int) -> Method:
        """The setting of a method that is best for so many experts."""
        categories = subset(self.plan.held_in, num_experts, tuning.SEED)

        def score(option: Method) -> float:
            return self._judge(self.merged(option, categories, seed=tuning.SEED), categories)

        return tuning.chosen(
            self.plan.places.tuned(self.size, self.base_name, name, num_experts),
            tuning.candidates(self.plan.settings.methods[name]),
            score,
            depends_on={"inputs": self._inputs(categories), "judge": self._judge_identity()},
        )

    def identity(self, model: str) -> dict[str, Any]:
        """What a model's parameters depend on, as JSON."""
        if model not in self._merges:
            return {"inputs": {model: self._digests[model]}}
        cell = self._merges[model]
        return {
            "method": repr(self.method(cell)),
            "seed": cell.seed,
            "inputs": self._inputs(cell.categories, cell.steps),
        }

    def _inputs(self, categories: Sequence[str], steps: int | None = None) -> dict[str, str]:
        names = [BASE, *(expert(category, steps) for category in categories)]
        return {name: self._digests[name] for name in names}

    def _expert(self, category: str, steps: int | None) -> epath.Path:
        return self.plan.expert_folder(self.size, self.base_name, category, steps)

    def _read(self, folder: epath.Path) -> Any:
        with self._counted("read"):
            return read_params(folder, self.config, self._mesh)

    def _streamed(
        self,
        method: Method,
        experts: Sequence[epath.Path],
        *,
        seed: int,
        output: epath.Path | None,
    ) -> Any:
        is_passing = output is None
        if is_passing:
            # Two workers may make the same merge at the same time, and one that was killed leaves its folder.
            output = self.plan.places.root / "streamed" / hosts.of_main(uuid.uuid4().hex)
        while True:
            with contextlib.suppress(manifest.Busy), self._counted("merge"):
                merge_checkpoints(
                    base=self.folder,
                    experts=list(experts),
                    output_dir=output,
                    method=method,
                    seed=seed,
                )
                break
            self._log(f"waiting for {output}, which another worker is writing")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        params = self._read(output)
        jax.block_until_ready(params)
        hosts.wait_for_all("a streamed merge is read")
        if is_passing and hosts.is_main():
            output.rmtree()
        return params

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Of every checkpoint, by the name of its model."""
        folders = {BASE: self.folder}
        folders |= {name: self._expert(*trained) for name, trained in self._trained.items()}
        if self.plan.settings.multitask is not None:
            folders[MULTITASK] = self.plan.places.multitask(self.size, self.base_name)
        found = {}
        for name, folder in folders.items():
            with contextlib.closing(open_checkpoint(folder)) as reader:
                found[name] = reader.digest()
        return found


def memory_bytes(mesh: jax.sharding.Mesh) -> float:
    """Of the mesh's devices together; of devices that are this machine's processor, the machine's, over all hosts."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    if None in limits:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        here = sum(limits)
    return float(sum(hosts.gather_json(here)))
