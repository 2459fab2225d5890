"""How fast, how near to what the storage allows, and how small a merge is; beside mergekit 0.1.5.

    python -m tests.benchmarks.merge --work_dir=/data/benchmark            # the first part, half an hour
    python -m tests.benchmarks.merge --work_dir=/data/benchmark --many --memory
    python -m tests.benchmarks.merge --parameters=2e6 --runs=1 --no_mergekit

Four parts, each a Markdown table on stdout; what is going on goes to stderr. Without a part named, the first.

  --speed   Every method: mergekit, this project and the storage bound in turn, as whole processes, output synced, inputs
            in the page cache; medians of the runs and their ratios. The bound is a loop that reads all inputs as often as
            the merge did, with as many threads, into a buffer that is used again and again, then writes and syncs as many
            bytes as the output has. The stage is what the manifest says, without the start of Python and imports.
  --many    Ten merges from one read (METHODS in a gin file) against the ten one by one; also whether the bits are equal.
  --memory  Every method under a small budget, at two sizes: the inputs of the first part, and larger ones made by
            repeating their data under other layer names (which takes as much disk as it says). RssAnon + RssShmem of the
            process are sampled every 20 ms. The inputs are dropped from the page cache before each run, since
            the larger ones would not fit in it, and time could not be linear in bytes.
  --formats Every method from and to safetensors, Orbax and T5X, in turn: the stage, and its ratio to that of safetensors.
            The inputs are converted by `launch.convert`, with its defaults: plain chunks in Orbax, gzip in T5X.

Inputs are folders of a Llama with the proportions of SmolLM2-360M (362 M parameters, bfloat16): base N(0, 0.02), experts
at N(0, 1e-3) from it. They are made once for each size, and used again where `--work_dir` has them. Without
`--work_dir` all goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from merging.checkpoints import safetensors
from merging.checkpoints.format import LeafSpec

REPOSITORY = pathlib.Path(__file__).parents[2]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SAMPLE_EVERY_S = 0.02
BLOCK_BYTES = (
    1 << 20
)  # of one read or write of the bound: stays in a core's cache; larger blocks are not faster
LOG_LINES = 20  # of a process that failed

# What mergekit calls the methods, at the defaults here: (merge_method, parameters, parameters of each model). `normalize`
# makes its dare_ties average the agreeing entries, as ours does.
MERGEKIT: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "averaging": ("linear", {}, {}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.4}, {}),
    "ties": ("ties", {"lambda": 1.0}, {"density": 0.2}),
    "dare": ("dare_linear", {"lambda": 0.4}, {"density": 0.5}),
    "dare_ties": ("dare_ties", {"lambda": 1.0, "normalize": True}, {"density": 0.5}),
}

# --many: (class, fields) by name. Four methods, TIES at three densities and several scales.
TEN: dict[str, tuple[str, dict[str, float]]] = {
    "averaging": ("Averaging", {}),
    "task_arithmetic": ("TaskArithmetic", {}),
    "dare_ties": ("DareTies", {}),
    **{
        f"ties_density_{density}_scale_{scale}": ("Ties", {"density": density, "scale": scale})
        for density, scales in ((0.1, (0.6, 1.0)), (0.2, (0.6, 0.8, 1.0)), (0.3, (0.6, 1.0)))
        for scale in scales
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    with work_folder(options.work_dir) as folder:
        bench = Bench(folder, options)
        print(f"{heading('merge', arguments)}\n", flush=True)
        inputs = make(folder, round(options.parameters), options.experts)
        print(f"{inputs.describe()}.\n", flush=True)
        for part in options.parts:
            part(bench, inputs)


@contextlib.contextmanager
def work_folder(given: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """The folder that was given, or one that goes at the end."""
    with contextlib.ExitStack() as cleanup:
        folder = given or pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        yield folder.resolve()


def heading(benchmark: str, arguments: Sequence[str]) -> str:
    """The command, but for the folder, which says nothing to others, and the machine."""
    shown = [f for f in arguments if not f.startswith("--work_dir")]
    return f"`{' '.join([f'python -m tests.benchmarks.{benchmark}', *shown])}`\n{machine()}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parameters", type=float, default=362e6, help="of each input, about")
    add("--experts", type=int, default=8)
    add("--runs", type=int, default=5, help="of which the median is taken")
    add("--methods", type=lambda text: text.split(","), default=list(MERGEKIT), help="with commas")
    add("--work_dir", type=pathlib.Path, help="keeps the inputs for the next time")
    add("--no_mergekit", action="store_true", help="for a quick look")
    add(
        "--mergekit_flags",
        default="--lazy-unpickle --async-write --no-copy-tokenizer --quiet",
        help="of mergekit-yaml",
    )
    for name, part in PARTS.items():
        add(f"--{name}", dest="parts", action="append_const", const=part, help="see above")
    add("--budget_bytes", type=float, default=512 * 2**20, help="of --memory")
    add(
        "--repetitions", type=int, default=9, help="of --memory: how often the larger inputs repeat"
    )
    add("--larger_experts", type=int, default=4, help="of --memory")
    options = parser.parse_args(arguments)
    unknown = set(options.methods) - set(MERGEKIT)
    if unknown:
        parser.error(f"no such methods: {', '.join(unknown)}; there are {', '.join(MERGEKIT)}")
    options.parts = options.parts or [speed]
    return options


# ---- the four parts -----------------------------------------------------------------------------------------------


def speed(bench: Bench, inputs: Inputs) -> None:
    """Every method: mergekit, this and the storage bound in turn."""
    names = [] if bench.options.no_mergekit else ["mergekit"]
    names += ["here", "stage", "bound"]
    seconds = {m: {name: [] for name in names} for m in bench.options.methods}
    passes = {}
    for run in range(bench.options.runs):
        for method, found in seconds.items():
            log(f"run {run + 1} of {bench.options.runs}: {method}")
            if "mergekit" in found:
                warm(inputs)
                found["mergekit"].append(bench.mergekit(method, inputs).seconds)
            warm(inputs)
            ours = bench.ours(inputs, f"--method={method}")
            found["here"].append(ours.seconds)
            found["stage"].append(ours.manifest["seconds"])
            passes[method] = max(1, round(ours.manifest["bytes_read"] / inputs.nbytes))
            warm(inputs)
            nbytes = ours.manifest["bytes_written"]
            found["bound"].append(bench.storage_bound(inputs, passes[method], nbytes))

    medians = {m: {k: statistics.median(v) for k, v in s.items()} for m, s in seconds.items()}
    rows = []
    for method, median in medians.items():
        theirs = median.get("mergekit")
        rows.append(
            [
                method,
                "-" if theirs is None else f"{theirs:.2f}",
                f"{median['here']:.2f}",
                "-" if theirs is None else f"{theirs / median['here']:.1f}",
                f"{median['stage']:.2f}",
                passes[method],
                f"{median['bound']:.2f}",
                f"{median['stage'] / median['bound']:.2f}",
            ]
        )
    heads = "method, mergekit s, here s, mergekit / here, stage s, reads, bound s, stage / bound"
    print(f"Medians of {bench.options.runs} runs, warm inputs, output synced.\n")
    table(heads.split(", "), rows)
    print("Every run, in seconds.\n")
    table(
        ["method", *names],
        [[m, *(" ".join(f"{x:.2f}" for x in s[n]) for n in names)] for m, s in seconds.items()],
    )


def many(bench: Bench, inputs: Inputs) -> None:
    """Ten merges from one read against the ten one by one."""
    configuration = bench.folder / "ten.gin"
    together: list[Run] = []
    alone: dict[str, list[Run]] = {name: [] for name in TEN}
    checksums: dict[str, dict[str, str]] = {}  # of the leaves, by merge
    for run in range(bench.options.runs):
        log(f"run {run + 1} of {bench.options.runs}: ten at once")
        configuration.write_text(ten_as_gin(inputs, bench.output))
        warm(inputs)
        together.append(bench.ours(None, f"--gin_file={configuration}", keep=True))
        for name in TEN:
            found = json.loads((bench.output / name / "manifest.json").read_text())
            checksums[name] = found["checksums"]
        shutil.rmtree(bench.output)
        for name, (method, fields) in TEN.items():
            log(f"run {run + 1} of {bench.options.runs}: {name}")
            bindings = [f"--gin.{method}.{field}={value}" for field, value in fields.items()]
            warm(inputs)
            alone[name].append(bench.ours(inputs, f"--gin.METHOD=@{method}()", *bindings))

    def row(what: str, runs: Sequence[Run], equal: str) -> list[Any]:
        read = runs[0].manifest["bytes_read"]
        return [
            what,
            f"{statistics.median(run.seconds for run in runs):.2f}",
            f"{read / 1e9:.3f}",
            f"{read / inputs.nbytes:.2f}",
            equal,
        ]

    rows = [
        row(name, runs, "yes" if runs[0].manifest["checksums"] == checksums[name] else "NO")
        for name, runs in alone.items()
    ]
    rows.append(row("ten at once", together, ""))
    one_by_one = statistics.median(
        sum(runs[run].seconds for runs in alone.values()) for run in range(bench.options.runs)
    )
    at_once = statistics.median(run.seconds for run in together)
    dearest = max(runs[0].manifest["bytes_read"] for runs in alone.values())
    print(f"Ten merges, medians of {bench.options.runs} runs, warm inputs, outputs synced.\n")
    table(["merge", "s", "GB read", "inputs read", "same bits at once and alone"], rows)
    print(
        f"At once {at_once:.2f} s, one by one {one_by_one:.2f} s: {at_once / one_by_one:.2f} of the time;"
        f" {together[0].manifest['bytes_read'] / dearest:.3f} of the bytes that the dearest alone reads.\n",
        flush=True,
    )


def memory(bench: Bench, inputs: Inputs) -> None:
    """Every method under a small budget, at two sizes."""
    budget = round(bench.options.budget_bytes)
    repetitions = bench.options.repetitions
    larger = repeat(inputs, min(bench.options.larger_experts, inputs.count), repetitions)
    rows = []
    for each in (inputs, larger):
        size = f"{each.parameters / 1e6:,.0f} M x {each.count}"
        for method in bench.options.methods:
            log(f"{method} at {size}")
            drop_from_cache(each)
            flags = (f"--method={method}", f"--gin.MEMORY_BUDGET_BYTES={budget}")
            run = bench.ours(each, *flags, is_watched=True)
            moved = run.manifest["bytes_read"] + run.manifest["bytes_written"]
            rows.append(
                [
                    size,
                    method,
                    f"{run.manifest['bytes_read'] / 1e9:.2f}",
                    f"{run.manifest['bytes_written'] / 1e9:.2f}",
                    f"{run.seconds:.1f}",
                    f"{run.manifest['seconds']:.1f}",
                    f"{run.manifest['seconds'] / moved * 1e9:.2f}",
                    f"{run.peak_bytes / 2**20:,.0f}",
                ]
            )
    print(
        f"Budget {budget / 2**20:,.0f} MiB; RssAnon + RssShmem every {SAMPLE_EVERY_S * 1e3:.0f} ms; inputs not in the"
        f" page cache. The larger inputs are {larger.nbytes / 1e9:.1f} GB: the smaller ones' data, {repetitions} times.\n"
    )
    heads = "inputs, method, GB read, GB written, s, stage s, stage s per GB, peak MiB"
    table(heads.split(", "), rows)


def formats(bench: Bench, inputs: Inputs) -> None:
    """Every method from and to each format."""
    each = {"safetensors": inputs} | {f: bench.converted(inputs, f) for f in ("orbax", "t5x")}
    stages: dict[tuple[str, str], list[Run]] = {}
    for run in range(bench.options.runs):
        for method in bench.options.methods:
            for form, converted in each.items():
                log(f"run {run + 1} of {bench.options.runs}: {method}, {form}")
                warm(converted)
                stages.setdefault((method, form), []).append(
                    bench.ours(converted, f"--method={method}")
                )
    medians = {
        key: statistics.median(run.manifest["seconds"] for run in runs)
        for key, runs in stages.items()
    }
    rows = [
        [
            method,
            form,
            " ".join(f"{run.manifest['seconds']:.2f}" for run in runs),
            f"{medians[method, form]:.2f}",
            f"{medians[method, form] / medians[method, 'safetensors']:.2f}",
        ]
        for (method, form), runs in stages.items()
    ]
    print(f"Stages of {bench.options.runs} runs, warm inputs.\n")
    table(["method", "format", "stages s", "median s", "against safetensors"], rows)


PARTS: dict[str, Callable[[Bench, Inputs], None]] = {
    "speed": speed,
    "many": many,
    "memory": memory,
    "formats": formats,
}


def ten_as_gin(inputs: Inputs, output: pathlib.Path) -> str:
    """A configuration of the ten merges."""
    methods = ", ".join(f"{name!r}: @m{i}/{TEN[name][0]}()" for i, name in enumerate(TEN))
    lines = [
        "include 'gin_configs/runs/merge.gin'",
        f"BASE = {str(inputs.base)!r}",
        f"EXPERTS = {[str(expert) for expert in inputs.experts]}",
        f"OUTPUT_DIR = {str(output)!r}",
        f"METHODS = {{{methods}}}",
    ]
    for i, (method, fields) in enumerate(TEN.values()):
        lines += [f"m{i}/{method}.{field} = {value}" for field, value in fields.items()]
    return "\n".join(lines) + "\n"


# ---- processes ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that has merged.

    Attributes:
      seconds: from its start until its output was on the disk.
      manifest: what it said of itself; empty for mergekit.
      peak_bytes: highest RssAnon + RssShmem, where it was watched.
    """

    seconds: float
    manifest: Mapping[str, Any]
    peak_bytes: int


class Bench:
    """Runs processes one after the other in a folder; `output` is removed after each."""

    def __init__(self, folder: pathlib.Path, options: argparse.Namespace):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder, options
        self.output = folder / "output"
        self._mergekit = pathlib.Path(sys.executable).with_name("mergekit-yaml")
        if speed in options.parts and not options.no_mergekit and not self._mergekit.exists():
            sys.exit(
                f"There is no {self._mergekit}: pip install -e '.[test,peers]', or give --no_mergekit"
            )

    def ours(
        self, inputs: Inputs | None, *flags: str, is_watched: bool = False, keep: bool = False
    ) -> Run:
        """`python -m launch.merge`; without inputs the flags say all."""
        command = [sys.executable, "-m", "launch.merge", *flags]
        if inputs is not None:
            experts = ",".join(map(str, inputs.experts))
            command += [f"--base={inputs.base}", f"--experts={experts}", f"--output={self.output}"]
        run = self._run(command, is_watched=is_watched)
        manifest = json.loads((self.output / "manifest.json").read_text())
        if not keep:
            shutil.rmtree(self.output)
        return dataclasses.replace(run, manifest=manifest)

    def converted(self, inputs: Inputs, form: str) -> Inputs:
        """The same in another format, made unless it is there."""
        made = dataclasses.replace(
            inputs, folder=inputs.folder.with_name(f"{inputs.folder.name}_{form}")
        )
        if not made.folder.exists():
            with staged(made) as partial:
                for source, target in zip(inputs.folders, partial.folders, strict=True):
                    bound = {"INPUT": f"{str(source)!r}", "FORMAT": f"{form!r}"}
                    bound["OUTPUT_DIR"] = f"{str(self.output)!r}"
                    flags = [f"--gin.{name}={value}" for name, value in bound.items()]
                    flags.append("--gin_file=gin_configs/runs/convert.gin")
                    self._run([sys.executable, "-m", "launch.convert", *flags])
                    target.rmdir()
                    self.output.rename(target)
        return made

    def mergekit(self, method: str, inputs: Inputs) -> Run:
        """`mergekit-yaml`, in the type of the inputs as is its way."""
        name, parameters, each = MERGEKIT[method]
        config = {
            "merge_method": name,
            "dtype": "bfloat16",
            "parameters": parameters,
            "models": [
                {"model": str(expert), "parameters": {"weight": 1.0, **each}}
                for expert in inputs.experts
            ],
        }
        if name != "linear":
            config["base_model"] = str(inputs.base)
        path = self.folder / f"mergekit_{method}.yml"
        path.write_text(json.dumps(config, indent=1))  # JSON is YAML
        flags = self.options.mergekit_flags.split()
        run = self._run([str(self._mergekit), str(path), str(self.output), *flags])
        shutil.rmtree(self.output)
        return run

    def _run(self, command: Sequence[str], *, is_watched: bool = False) -> Run:
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()  # what was written before must not be waited for
        log = self.folder / "log.txt"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # An installed package is byte-compiled; so is this one after the first run, unless that is forbidden.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        peak = 0
        with log.open("wb") as out:
            begun = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
            try:
                while is_watched and process.poll() is None:
                    peak = max(peak, resident_bytes(process.pid))
                    time.sleep(SAMPLE_EVERY_S)
                process.wait()
            finally:
                process.kill()
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
        sync(self.output)
        return Run(time.perf_counter() - begun, {}, peak)

    def storage_bound(self, inputs: Inputs, passes: int, nbytes: int) -> float:
        """Seconds to read all inputs so many times, then to write that many bytes and sync them."""
        os.sync()
        block = np.random.default_rng(0).bytes(BLOCK_BYTES)
        path = self.folder / "bound.bin"
        begun = time.perf_counter()
        for _ in range(passes):
            read_all(inputs.files())
        with path.open("wb", buffering=0) as file:
            for left in range(nbytes, 0, -BLOCK_BYTES):
                file.write(block[: min(left, BLOCK_BYTES)])
            os.fsync(file.fileno())
        sync(self.folder)
        seconds = time.perf_counter() - begun
        path.unlink()
        return seconds


def resident_bytes(process: int) -> int:
    """RssAnon + RssShmem of a process; 0 where it has ended."""
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    kib = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * sum(map(int, kib))


# ---- the disk -----------------------------------------------------------------------------------------------------


def sync(folder: pathlib.Path) -> None:
    """Waits until a folder, and all in it, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def warm(inputs: Inputs) -> None:
    """Brings all inputs into the page cache."""
    read_all(inputs.files())


def read_all(files: Sequence[pathlib.Path]) -> None:
    """Reads files block by block into one buffer of each thread; as many threads as a merge has."""
    workers = max(2, os.cpu_count() or 1)
    with contextlib.ExitStack() as opened:
        handles = [opened.enter_context(path.open("rb")) for path in files]
        blocks = [
            (handle.fileno(), offset)
            for handle in handles
            for offset in range(0, os.fstat(handle.fileno()).st_size, BLOCK_BYTES)
        ]

        def read(worker: int) -> None:
            buffer = memoryview(bytearray(BLOCK_BYTES))
            for descriptor, offset in blocks[worker::workers]:
                os.preadv(descriptor, [buffer], offset)

        threads = [threading.Thread(target=read, args=(worker,)) for worker in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def drop_from_cache(inputs: Inputs) -> None:
    """So that the next reader gets them from the disk."""
    os.sync()  # only clean pages can be dropped
    for path in inputs.files():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- inputs -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A base and its experts, each a Hugging Face folder of so many parameters."""

    folder: pathlib.Path
    parameters: int
    count: int

    @property
    def base(self) -> pathlib.Path:
        return self.folder / "base"

    @property
    def experts(self) -> list[pathlib.Path]:
        return [self.folder / f"expert_{i}" for i in range(self.count)]

    @property
    def folders(self) -> list[pathlib.Path]:
        return [self.base, *self.experts]

    def files(self) -> list[pathlib.Path]:
        """All that are in them."""
        found = (path for folder in self.folders for path in sorted(folder.rglob("*")))
        return [path for path in found if path.is_file()]

    @property
    def nbytes(self) -> int:
        """Of the arrays of all inputs."""
        return (1 + self.count) * self.parameters * BFLOAT16.itemsize

    def describe(self) -> str:
        return (
            f"A base and {self.count} experts of {self.parameters / 1e6:,.2f} M bfloat16 parameters"
            f" ({self.nbytes / 1e9:.2f} GB)"
        )


def make(folder: pathlib.Path, parameters: int, experts: int) -> Inputs:
    """The inputs of about that size, made unless they are there."""
    size = min(range(1, 129), key=lambda size: abs(count(llama(size)) - parameters))
    specs = llama(size)
    made = Inputs(folder / f"llama_{size}_x_{experts}", count(specs), experts)
    if not made.folder.exists():
        with staged(made) as partial:
            fill(partial, specs)
            for each in partial.folders:
                (each / "config.json").write_text(json.dumps(llama_config(size), indent=1))
    return made


def llama(size: int) -> dict[str, LeafSpec]:
    """The leaves of a Llama with tied embeddings; at size 32 those of SmolLM2-360M."""
    hidden, inner, keys = 30 * size, 80 * size, 10 * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1536 * size, hidden)}
    for layer in range(size):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "mlp.down_proj": (hidden, inner),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.v_proj": (keys, hidden),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    return {n: LeafSpec(name=n, shape=shape, dtype=BFLOAT16) for n, shape in shapes.items()}


def llama_config(size: int) -> dict[str, Any]:
    """config.json of that model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 30 * size,
        "intermediate_size": 80 * size,
        "num_hidden_layers": size,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 2 * size,
        "vocab_size": 1536 * size,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def count(specs: Mapping[str, LeafSpec]) -> int:
    return sum(spec.size for spec in specs.values())


@contextlib.contextmanager
def staged(made: Inputs) -> Iterator[Inputs]:
    """The same inputs under a temporary name, which they lose when all of them are there."""
    log(f"making {made.folder}, {made.nbytes / 1e9:.2f} GB")
    free = shutil.disk_usage(made.folder.parent).free
    needed = made.nbytes * (made.count + 2) // (made.count + 1)  # and one output
    if free < needed:
        sys.exit(
            f"{made.folder.parent} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed"
        )
    partial = dataclasses.replace(made, folder=made.folder.with_suffix(".partial"))
    shutil.rmtree(partial.folder, ignore_errors=True)
    for folder in partial.folders:
        folder.mkdir(parents=True)
    yield partial
    partial.folder.rename(made.folder)


def fill(inputs: Inputs, specs: Mapping[str, LeafSpec]) -> None:
    """Writes random weights, leaf by leaf."""
    folders = inputs.folders
    writers = [safetensors.Writer(f, specs, shard_bytes=5_000_000_000) for f in folders]
    for number, spec in enumerate(specs.values()):
        whole = tuple(slice(0, length) for length in spec.shape)
        base = None
        for i, writer in enumerate(writers):
            random = np.random.default_rng((i, number))
            leaf = random.standard_normal(spec.shape, np.float32)
            leaf *= np.float32(0.02 if base is None else 1e-3)
            if base is not None:
                leaf += base
            stored = leaf.astype(BFLOAT16)
            writer.write(spec.name, whole, stored)
            if base is None:
                base = stored.astype(np.float32)
    for writer in writers:
        writer.commit()


def repeat(inputs: Inputs, experts: int, times: int) -> Inputs:
    """Inputs so many times as large: the same data under other layer names, one file for each repetition."""
    made = Inputs(
        inputs.folder.with_name(f"{inputs.folder.name}_repeated_{times}_x_{experts}"),
        inputs.parameters * times,
        experts,
    )
    if made.folder.exists():
        return made
    with staged(made) as partial:
        sources, targets = inputs.folders, partial.folders
        for source, target in zip(sources[: 1 + experts], targets, strict=True):
            repeat_one(source, target, times)
    return made


def repeat_one(source: pathlib.Path, target: pathlib.Path, times: int) -> None:
    """The same for one folder."""
    config = json.loads((source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers * times
    (target / "config.json").write_text(json.dumps(config, indent=1))
    weight_map = {}
    with (source / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.tell()
        metadata = header.pop("__metadata__")
        for number in range(times):
            tree = {repeated_name(n, number, layers): entry for n, entry in header.items()}
            name = f"model-{number + 1:05d}-of-{times:05d}.safetensors"
            raw = json.dumps({"__metadata__": metadata, **tree}).encode()
            raw += b" " * (-(8 + len(raw)) % 64)
            with (target / name).open("wb") as copy:
                copy.write(len(raw).to_bytes(8, "little") + raw)
                file.seek(data)
                shutil.copyfileobj(file, copy, 16 << 20)
                copy.flush()
                os.fsync(copy.fileno())
                os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            weight_map |= dict.fromkeys(tree, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def repeated_name(name: str, number: int, layers: int) -> str:
    """A leaf's name in a repetition of so many layers; those of the first one keep theirs."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer:
        return f"model.layers.{int(layer[1]) + number * layers}.{layer[2]}"
    return f"repetition_{number}.{name}" if number else name


# ---- words --------------------------------------------------------------------------------------------------------


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """What it ran on, in one line."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    kib = re.search(r"^MemTotal:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    versions = []
    for name in ("jax", "mergekit", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"On {cpu.group(1) if cpu else platform.processor() or platform.machine()}, {os.cpu_count()} cores,"
        f" {int(kib.group(1)) / 2**20 if kib else 0:.0f} GiB of memory, {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}, {', '.join(versions)}."
    )


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """As Markdown; numbers to the right."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "|".join("---" if i == 0 else "---:" for i in range(len(heads))) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
