"""Who may import whom: the rows of the design, and what a plain `import merging` brings in."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]

# A file imports from its own row and the rows above.
ROWS = [
    {"kernels", "checkpoints", "partitioning", "interrupted", "manifest", "paths"},
    {"methods", "models"},
    {"engine", "training", "evaluation", "reporting"},
    {"grid"},
    {
        "finetune",
        "merge",
        "mergekit",
        "convert",
        "evaluate",
        "study",
        "study_models",
        "report",
        "__init__",
    },
]
FORBIDDEN = {
    "merging": {"gin", "absl", "tensorflow", "seqio", "torch", "t5x", "launch", "tasks", "tests"},
    "tasks": {"gin", "absl", "torch", "t5x", "launch", "merging", "tests"},
    "launch": {"t5x", "tests"},
}


def source_files(package: str) -> list[pathlib.Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            assert node.module is not None
            for alias in node.names:
                submodule = REPOSITORY.joinpath(*node.module.split("."), alias.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def row(module: str) -> int:
    """The row of a module of the library."""
    part = (module.split(".") + ["__init__"])[1]
    for number, parts in enumerate(ROWS):
        if part in parts:
            return number
    raise AssertionError(f"{module} stands in no row: put {part} into ROWS, after the design")


def shown(path: pathlib.Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_apart(package: str):
    found = [
        f"{shown(path)}:{line} imports {module}"
        for path in source_files(package)
        for line, module in imported(path)
        if module.split(".")[0] in FORBIDDEN[package]
    ]
    assert not found


def test_files_import_only_from_their_row_and_above():
    found = []
    for path in source_files("merging"):
        importer = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for line, module in imported(path):
            if module.split(".")[0] == "merging" and row(module) > row(importer):
                found.append(f"{shown(path)}:{line} imports {module}, which is further down")
    assert not found


def modules_after(statement: str) -> set[str]:
    """Top-level packages that are loaded after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["merging", "merging.merge"])
def test_the_library_brings_in_no_framework_but_jax(module: str):
    loaded = modules_after(f"import {module}")
    assert "jax" in loaded
    assert not loaded & {"tensorflow", "seqio", "gin", "torch", "launch", "tasks"}


@pytest.mark.parametrize("module", ["tasks", "tasks.catalog", "tasks.metrics", "tasks.packing"])
def test_tasks_are_described_without_tensorflow(module: str):
    assert not modules_after(f"import {module}") & {
        "tensorflow",
        "seqio",
        "jax",
        "datasets",
        "merging",
    }


@pytest.mark.parametrize(
    "module",
    [
        "launch.merge",
        "launch.convert",
        "launch.report",
        "launch.study",
        "launch.pod.local",
        "launch.pod.tpu_vm",
        "launch.pod.gke",
        "launch.tasks",
    ],
)
def test_an_entry_point_prints_its_help_without_jax(module: str):
    assert not modules_after(f"import {module}") & {
        "jax",
        "merging",
        "tensorflow",
        "seqio",
        "torch",
    }


def test_the_configurations_are_data_only():
    assert [shown(path) for path in source_files("gin_configs")] == ["gin_configs/__init__.py"]
    assert not list(imported(REPOSITORY / "gin_configs" / "__init__.py"))
