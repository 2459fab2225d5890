"""How all tests run: 8 virtual CPU devices, strict dtype promotion, checked annotations, no network, flags parsed.

Set before jax is imported, since it reads its environment once. What takes long in most tests is compiling, so a program is
compiled once in a run: it is kept in a folder of the run, where the other workers and the processes that tests start
find it; and where a test isn't about the arithmetic of a merge, most optimizations are left out.
"""

from __future__ import annotations

import ipaddress
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

from launch import devices

os.environ.update(devices.cpu_environment(os.environ, devices=8))

# Workers have it from the process that started them.
COMPILED = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="merging-tests-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import beartype  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

# The parts whose annotations, shapes included, are checked as they are called. Not among them: methods and the engine's
# records, whose numbers may be traced arrays, and what is tested with arguments of a wrong type.
CHECKED = [
    "merging.checkpoints",
    "merging.manifest",
    "merging.kernels.arithmetic",
    "merging.kernels.election",
    "merging.kernels.masks",
]

# The import hook wants the checker by name. An int is a float here, as PEP 484 has it.
checker = types.ModuleType("checked_annotations")
checker.checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
jaxtyping.install_import_hook(CHECKED, f"{checker.__name__}.checked")

REPOSITORY = pathlib.Path(__file__).parent.parent

# Files and folders whose programs are large and quick; the processes they start optimize as everywhere. Merges must not be among
# them: whether the compiler fuses a product into a sum is what their tests are about. Nor what is compared with other programs.
UNOPTIMIZED = tuple(
    REPOSITORY / "tests/merging" / name
    for name in ("models", "training", "evaluation", "test_finetune.py", "test_evaluate.py")
)
OPTIMIZED = ("test_real_models.py", "test_real_evaluation.py")


@pytest.fixture(scope="module")
def optax_promotes() -> Iterator[None]:
    """optax raises float numbers to the power of a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Flags are parsed as an entry point would parse an empty command line."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Where the folder of compiled programs was made, it goes."""
    if COMPILED is not None:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def compiled_without_optimizations(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the modules of UNOPTIMIZED; nothing that they compiled is left to the next."""
    is_quick = any(request.path.is_relative_to(place) for place in UNOPTIMIZED)
    if not is_quick or request.path.name in OPTIMIZED:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A connection to anything but this machine is an error."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
            raise RuntimeError(f"a test tried to connect to {address}: tests use no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real inputs."""
    named = os.environ.get("MERGING_REAL_DATA", str(REPOSITORY / "../shared/real"))
    if not named or not pathlib.Path(named).is_dir():
        pytest.skip(f"no real data: MERGING_REAL_DATA, {named!r}, is no folder")
    return pathlib.Path(named).resolve()


@pytest.fixture(scope="session")
def real_checkpoints() -> pathlib.Path:
    """The folder of real checkpoints, one Hugging Face folder each."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    named = os.environ.get("MERGING_REAL_CHECKPOINTS", f"{cache}/merging-at-scale/real")
    if not pathlib.Path(named).is_dir():
        pytest.skip(
            f"no real checkpoints: MERGING_REAL_CHECKPOINTS, {named!r}, is no folder;"
            " ./tests/run.sh makes them where MERGING_REAL_DATA has make_checkpoints.py"
        )
    return pathlib.Path(named)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: resolving it would already be network
        return False
