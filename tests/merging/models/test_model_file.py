"""model.json: what is written is read, of every family; what isn't known is refused by name."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from merging.checkpoints.format import CheckpointError
from merging.models import model_file
from merging.models.model_file import Vocabulary
from tests.merging.models import families

STACKED = {"layers": 0}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_is_written_is_read(family: str, tmp_path: pathlib.Path):
    config = families.CONFIGS[family]
    vocabulary = Vocabulary(name="miniature", digest="5f")
    model_file.write(tmp_path, config, STACKED, vocabulary)
    found = model_file.read(tmp_path)
    assert found == model_file.ModelFile(config=config, stacked=STACKED, vocabulary=vocabulary)
    assert model_file.describe(tmp_path) == found
    changed = model_file.read(tmp_path, dropout_rate=0.25, param_dtype="bfloat16").config
    assert changed == dataclasses.replace(config, dropout_rate=0.25, param_dtype="bfloat16")


def test_what_a_run_chooses_is_not_the_models(tmp_path: pathlib.Path):
    config = dataclasses.replace(families.CONFIGS["palm"], dropout_rate=0.1, remat="full")
    model_file.write(tmp_path, config, STACKED, None)
    assert model_file.read(tmp_path).config == families.CONFIGS["palm"]
    assert model_file.read(tmp_path).vocabulary is None


def test_the_positions_that_a_model_has_learnt_may_stay_unsaid(tmp_path: pathlib.Path):
    config = dataclasses.replace(families.CONFIGS["llama"], max_positions=512)
    model_file.write(tmp_path, config, STACKED, None)
    assert model_file.read(tmp_path).config == config
    path = tmp_path / "model.json"
    said = json.loads(path.read_text())
    del said["sizes"]["max_positions"]  # as before it was known
    path.write_text(json.dumps(said))
    assert model_file.read(tmp_path).config == families.CONFIGS["llama"]
    said["sizes"]["max_positions"] = "512"
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="max_positions is '512', wanted int ."):
        model_file.read(tmp_path)


def test_a_vocabularys_files_go_along(tmp_path: pathlib.Path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (theirs / name).write_text(f'{{"of": "{name}"}}')
    (theirs / "README.md").write_text("of another model")
    vocabulary = model_file.vocabulary_of_files(theirs, digest="ab")
    assert vocabulary is not None
    model_file.write(ours, families.CONFIGS["llama"], STACKED, vocabulary)
    found = model_file.read(ours).vocabulary
    assert found is not None and found.path is not None
    assert found.digest == "ab" and found.path.read_text() == '{"of": "tokenizer.json"}'
    assert sorted(found.files) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert not (ours / "README.md").exists()
    (ours / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="'tokenizer.json' is not there"):
        model_file.read(ours)


def described(**changes: Any) -> dict[str, Any]:
    sizes = dataclasses.asdict(families.CONFIGS["palm"])
    del sizes["dropout_rate"], sizes["remat"]
    whole = {
        "version": 1,
        "family": "palm",
        "sizes": sizes,
        "stacked": STACKED,
        "vocabulary": None,
    }
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version is 2, wanted 1"),
        ({"family": "gpt"}, "family is 'gpt'; there are palm, llama, gemma3"),
        ({"sizes": {}}, "sizes: embed_dim is missing"),
        ({"sizes": described()["sizes"] | {"experts": 8}}, "experts is unknown to palm"),
        ({"sizes": described()["sizes"] | {"head_dim": 7}}, "head_dim is 7: it must be even"),
        ({"sizes": described()["sizes"] | {"num_layers": "3"}}, "model.json"),
        ({"stacked": {"layers": "0"}}, "wanted {pattern: axis}"),
        ({"vocabulary": "bytes"}, "wanted a name, a digest and files"),
        ({"more": 1}, "more is unknown"),
    ],
)
def test_what_is_not_known_is_refused(
    changes: dict[str, Any], message: str, tmp_path: pathlib.Path
):
    (tmp_path / "model.json").write_text(json.dumps(described()))
    assert model_file.read(tmp_path).config == families.CONFIGS["palm"]
    (tmp_path / "model.json").write_text(json.dumps(described(**changes)))
    with pytest.raises(CheckpointError, match=message):
        model_file.read(tmp_path)


def test_without_any_description_it_says_what_to_give(tmp_path: pathlib.Path):
    with pytest.raises(CheckpointError, match=r"MODEL.*VOCABULARY"):
        model_file.describe(tmp_path)
