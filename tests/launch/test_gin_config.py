"""gin parsing: T5X's order, every .gin file, and the errors that gin alone would swallow."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import re

import pytest

from launch import gin_config
from launch.merge import RUN_FILE, configured, shorthand
from merging.engine.plan import Settings
from merging.methods import METHODS
from merging.methods.averaging import Averaging
from merging.methods.ties import Ties

TIES_FILE = "gin_configs/methods/ties.gin"
MUST_HAVES = ["BASE = '/base'", "EXPERTS = ['/a', '/b']", "OUTPUT_DIR = '/merged'"]
GIN_FILES = [
    *sorted((gin_config.CONFIGS / "methods").glob("*.gin")),
    gin_config.CONFIGS / "runs" / "merge.gin",
]  # of the merge; models and meshes have tests of their own


def relative(path: pathlib.Path) -> str:
    return path.relative_to(gin_config.CONFIGS).as_posix()


# ---- the files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GIN_FILES, ids=relative)
def test_every_file_parses(path: pathlib.Path):
    files = {"runs": [RUN_FILE, TIES_FILE], "methods": [RUN_FILE, str(path)]}[path.parent.name]
    resolved = configured(files, MUST_HAVES)
    assert resolved.arguments["base"] == "/base"
    assert resolved.arguments["experts"] == ["/a", "/b"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_file_that_sets_it_with_its_defaults(name: str):
    resolved = configured([RUN_FILE, f"gin_configs/methods/{name}.gin"], MUST_HAVES)
    assert resolved.arguments["method"] == METHODS[name]()


@pytest.mark.parametrize("name", METHODS)
def test_the_header_of_a_method_names_each_of_its_fields(name: str):
    header = (gin_config.CONFIGS / "methods" / f"{name}.gin").read_text().partition("METHOD =")[0]
    cls = METHODS[name]
    named = set(re.findall(rf"\b{cls.__name__}\.(\w+)", header))
    assert named == {field.name for field in dataclasses.fields(cls)}


def test_the_header_of_the_merge_names_each_macro():
    text = (gin_config.CONFIGS / "runs" / "merge.gin").read_text()
    header, _, body = text.partition("\nBASE =")
    for macro in re.findall(r"^([A-Z_]+) =", "BASE =" + body, re.MULTILINE):
        assert re.search(rf"\b{macro}\b", header), macro


def test_defaults_of_the_merge_are_those_of_the_stage():
    arguments = configured([RUN_FILE, TIES_FILE], MUST_HAVES).arguments
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert set(arguments) == set(fields)
    for name, default in fields.items():
        if default is not dataclasses.MISSING and name != "method":
            assert arguments[name] == default, name


# ---- order and scopes -------------------------------------------------------------------------------------------


def test_later_files_win_over_earlier_ones_and_bindings_over_files(tmp_path: pathlib.Path):
    (tmp_path / "mine.gin").write_text(f"include '{TIES_FILE}'\nSEED = 1\nTies.density = 0.3\n")
    files = [RUN_FILE, "mine.gin"]
    first = configured(files, MUST_HAVES, search_paths=[str(tmp_path)])
    assert first.arguments["seed"] == 1
    assert first.arguments["method"] == Ties(density=0.3)
    second = configured(files, [*MUST_HAVES, "SEED = 2"], search_paths=[str(tmp_path)])
    assert second.arguments["seed"] == 2


def test_the_first_search_path_with_the_file_wins(tmp_path: pathlib.Path):
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.gin").write_text(f"SEED = {seed}\n")
    for paths, seed in ((("a", "b"), 1), (("b", "a"), 2)):
        resolved = configured(
            [RUN_FILE, TIES_FILE, "mine.gin"],
            MUST_HAVES,
            search_paths=[str(tmp_path / path) for path in paths],
        )
        assert resolved.arguments["seed"] == seed


def test_the_projects_own_configurations_are_found_from_any_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for run in (RUN_FILE, "runs/merge.gin"):
        assert configured([run, TIES_FILE], MUST_HAVES).arguments["method"] == Ties()


def test_scopes_tell_merges_of_one_method_apart():
    resolved = configured(
        [RUN_FILE],
        [
            *MUST_HAVES,
            "METHODS = {'a': @a/Ties(), 'b': @b/Ties(), 'mean': @Averaging()}",
            "Ties.scale = 0.5",
            "a/Ties.density = 0.1",
        ],
    )
    assert resolved.arguments["method"] is None
    assert resolved.arguments["methods"] == {
        "a": Ties(density=0.1, scale=0.5),
        "b": Ties(scale=0.5),
        "mean": Averaging(),
    }


def test_methods_are_instances_of_the_class_itself():
    method = configured([RUN_FILE, TIES_FILE], MUST_HAVES).arguments["method"]
    assert type(method) is Ties
    assert pickle.loads(pickle.dumps(method)) == method


def test_the_operative_configuration_gives_the_same_again(tmp_path: pathlib.Path):
    first = configured([RUN_FILE, TIES_FILE], [*MUST_HAVES, "Ties.density = 0.3"])
    assert "density = 0.3" in first.text and "zero_sign = 'majority'" in first.text
    (tmp_path / "config.gin").write_text(first.text)
    second = configured([str(tmp_path / "config.gin")], [])
    assert second == first


# ---- flags ------------------------------------------------------------------------------------------------------


def test_gin_flags_are_rewritten_for_absl():
    argv = ["merge", "--gin.BASE='/a=b'", "--gin.a/Ties.density=0.1", "--gin_file=x", "--dry_run"]
    assert gin_config.rewrite_arguments(argv) == [
        "merge",
        "--gin_bindings=BASE = '/a=b'",
        "--gin_bindings=a/Ties.density = 0.1",
        "--gin_file=x",
        "--dry_run",
    ]


def test_a_gin_flag_without_a_value_is_an_error():
    with pytest.raises(ValueError, match="--gin.BASE lacks a value: write --gin.BASE=VALUE"):
        gin_config.rewrite_arguments(["merge", "--gin.BASE"])


def test_shorthand_stands_for_files_and_macros():
    files, bindings = shorthand(
        base="/base", experts=["/a", "/b"], method="ties", output="/merged", files=[]
    )
    assert files == [RUN_FILE, TIES_FILE]
    assert bindings == MUST_HAVES
    assert configured(files, bindings) == configured([RUN_FILE, TIES_FILE], MUST_HAVES)


@pytest.mark.parametrize(
    ("given", "method", "files"),
    [
        ([], None, [RUN_FILE]),
        (["mine.gin"], None, ["mine.gin"]),
        ([RUN_FILE, "mine.gin"], "dare", [RUN_FILE, "mine.gin", "gin_configs/methods/dare.gin"]),
        (["mine.gin"], "dare", [RUN_FILE, "mine.gin", "gin_configs/methods/dare.gin"]),
    ],
)
def test_shorthand_goes_around_given_files(given: list[str], method: str | None, files: list[str]):
    assert shorthand(base=None, experts=None, method=method, output=None, files=given) == (
        files,
        [],
    )


# ---- errors -----------------------------------------------------------------------------------------------------


def error_of(files: list[str], bindings: list[str], **kwargs: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        configured(files, bindings, **kwargs)
    return str(caught.value)


def test_all_missing_must_haves_are_told_at_once_with_examples():
    message = error_of([RUN_FILE], [])
    assert message.splitlines()[1:] == [
        """  --gin.BASE='"/data/base"'""",
        """  --gin.EXPERTS='["/data/expert_a", "/data/expert_b"]'""",
        """  --gin.METHOD='@Ties()'  (or METHODS)""",
        """  --gin.OUTPUT_DIR='"/data/merged"'""",
    ]
    assert "BASE" not in error_of([RUN_FILE], MUST_HAVES)


@pytest.mark.parametrize(
    "example",
    [
        m.group(1)
        for m in re.finditer(
            r"e\.g\. (.+)", (gin_config.CONFIGS / "runs" / "merge.gin").read_text()
        )
    ],
)
def test_the_examples_are_gin_values(example: str):
    configured([RUN_FILE, TIES_FILE], [*MUST_HAVES, f"STACKED = {example}"])


@pytest.mark.parametrize("typo", ["OUTPUT_DRI", "output_dir", "OUTPUTDIR"])
def test_a_mistyped_macro_names_the_nearest(typo: str):
    message = error_of([RUN_FILE, TIES_FILE], [*MUST_HAVES, f"{typo} = '/x'"])
    assert f"--gin.{typo}='/x': nothing uses a macro {typo}" in message
    assert "Did you mean OUTPUT_DIR" in message


def test_a_mistyped_macro_in_a_file_is_told_with_its_line(tmp_path: pathlib.Path):
    (tmp_path / "mine.gin").write_text("# mine\nSED = 1\n")
    message = error_of([RUN_FILE, TIES_FILE, "mine.gin"], MUST_HAVES, search_paths=[str(tmp_path)])
    assert f"{tmp_path / 'mine.gin'}:2: nothing uses a macro SED" in message


def test_a_macro_that_only_an_overridden_binding_used_is_no_typo(tmp_path: pathlib.Path):
    (tmp_path / "mine.gin").write_text("DENSITY = 0.3\nTies.density = %DENSITY\n")
    resolved = configured(
        [RUN_FILE, TIES_FILE, "mine.gin"],
        [*MUST_HAVES, "Ties.density = 0.4"],
        search_paths=[str(tmp_path)],
    )
    assert resolved.arguments["method"] == Ties(density=0.4)


def test_a_macro_that_nothing_sets_names_the_nearest():
    message = error_of([RUN_FILE, TIES_FILE], [*MUST_HAVES, "merge.seed = %SED"])
    assert "nothing sets %SED. Did you mean SEED" in message


@pytest.mark.parametrize(
    ("binding", "shown"),
    [
        ("OUTPUT_DIR=/data/x", """--gin.OUTPUT_DIR='"/data/x"'"""),
        ("OUTPUT_DIR = merged", """--gin.OUTPUT_DIR='"merged"'"""),
        ("EXPERTS=[/a, /b]", """--gin.EXPERTS='["/a", "/b"]'"""),
    ],
)
def test_a_string_without_quotes_is_shown_with_them(binding: str, shown: str):
    message = error_of([RUN_FILE, TIES_FILE], [*MUST_HAVES, binding])
    assert message.endswith(shown)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Ties.densty = 0.1", "'Ties' doesn't have a parameter named 'densty'"),
        ("Tees.density = 0.1", "No configurable matching 'Tees'"),
        ("METHOD = @Tees()", "No configurable matching reference '@Tees\\(\\)'"),
        ("merge.bas = 'x'", "'merge' doesn't have a parameter named 'bas'"),
        ("merge.progress = 1", "'merge' doesn't have a parameter named 'progress'"),
        ("Ties.density = 2", "Ties.density is 2"),
        ("SEED", "is not of the form 'NAME = VALUE'"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_an_error(binding: str, message: str):
    with pytest.raises(ValueError, match=message):
        configured([RUN_FILE, TIES_FILE], [*MUST_HAVES, binding])


def test_a_file_that_is_not_there_names_the_nearest():
    assert "Did you mean gin_configs/methods/ties.gin" in error_of(
        [RUN_FILE, "gin_configs/methods/tis.gin"], []
    )


def test_a_file_that_is_not_gin_is_told_with_its_line(tmp_path: pathlib.Path):
    (tmp_path / "mine.gin").write_text("SEED = 1\nBASE = /data/x\n")
    message = error_of([RUN_FILE, str(tmp_path / "mine.gin")], [])
    assert (
        "mine.gin can't be read as gin: Unable to parse value (line 2: BASE = /data/x)" in message
    )


def test_a_stage_argument_that_nothing_binds_is_told():
    assert "merge.base is not bound: give --gin_file=gin_configs/runs/merge.gin" in error_of(
        [], ["merge.output_dir = '/x'"]
    )


def test_an_error_leaves_the_next_parse_as_if_nothing_had_been():
    error_of([RUN_FILE, TIES_FILE], [*MUST_HAVES, "SEED = 7", "Ties.density = 2"])
    assert configured([RUN_FILE, TIES_FILE], MUST_HAVES).arguments["seed"] == 0
