"""Our own tree and Hugging Face's: from the one to the other and back by convert, and both in one merge."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import flax.traverse_util
import numpy as np
import pytest
from safetensors.numpy import save_file

import merging
from merging.checkpoints import boxes, open_checkpoint
from merging.checkpoints.layout_reader import arranged
from merging.convert import Settings, convert
from merging.methods.dare_ties import DareTies
from merging.models import huggingface, model_file
from merging.models.config import DecoderConfig, Gemma3Config, LlamaConfig
from merging.models.families import model_of
from tests import models
from tests.merging.models import families

GATED = ["llama", "gemma3"]


def own_tree(config: DecoderConfig, seed: int = 0) -> models.Model:
    params = families.params_of(model_of(config), seed)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def save(folder: pathlib.Path, leaves: models.Model) -> None:
    folder.mkdir(parents=True)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def save_own(folder: pathlib.Path, config: DecoderConfig, leaves: models.Model) -> pathlib.Path:
    """As a run that trains writes it, in a format that needs no writer of ours."""
    save(folder, leaves)
    model_file.write(folder, config, model_file.stacked_of(config), None)
    return folder


def save_theirs(
    folder: pathlib.Path, config: LlamaConfig | Gemma3Config, ours: models.Model
) -> pathlib.Path:
    """A Hugging Face folder, with keys in config.json that we don't read, and a tokenizer."""
    save(folder, arranged(huggingface.layout(config).inverse(), ours))
    values = huggingface.to_json(config) | {"initializer_range": 0.01, "eos_token_id": [2, 3]}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text('{"a tokenizer": 1}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    return folder


def load(folder: pathlib.Path) -> models.Model:
    reader = open_checkpoint(folder)
    leaves = {n: reader.read(n, boxes.whole(spec.shape)) for n, spec in reader.specs().items()}
    reader.close()
    return leaves


def beside(folder: pathlib.Path) -> dict[str, object]:
    names = ("config.json", "tokenizer.json", "generation_config.json")
    return {name: json.loads((folder / name).read_text()) for name in names}


@pytest.mark.parametrize(("family", "options"), [("llama", ""), ("gemma3", "(scan_layers=False)")])
def test_to_our_own_tree_and_back(family: str, options: str, tmp_path: pathlib.Path):
    config = families.build(family, param_dtype="bfloat16").config
    ours = own_tree(config)
    folder = save_theirs(tmp_path / "in", config, ours)
    own = tmp_path / "own"
    convert(Settings(input=folder, output_dir=own, layout=f"own{options}", format="orbax"))
    if options:
        config = dataclasses.replace(config, scan_layers=False)
        ours = arranged(huggingface.layout(config), models.load(folder))
    assert models.same_bits(load(own), ours)
    described = model_file.read(own)
    assert described.config == config and described.stacked == model_file.stacked_of(config)
    assert described.vocabulary.name == "tokenizer.json"
    convert(Settings(input=own, output_dir=tmp_path / "out", layout="huggingface"))
    assert models.same_bits(models.load(tmp_path / "out"), models.load(folder))
    assert beside(tmp_path / "out") == beside(folder)
    assert not (tmp_path / "out/model.json").exists()
    again = Settings(input=tmp_path / "out", output_dir=tmp_path / "again", layout="huggingface")
    convert(again)
    assert models.same_bits(models.load(tmp_path / "again"), models.load(folder))


@pytest.mark.peers
@pytest.mark.parametrize("family", GATED)
def test_transformers_opens_what_was_never_theirs(family: str, tmp_path: pathlib.Path):
    """A model of ours alone: config.json is made of model.json."""
    torch = pytest.importorskip("torch", reason="extra peers")
    transformers = pytest.importorskip("transformers", reason="extra peers")
    # transformers takes nothing but whole numbers for what gemma's query scale is made of.
    model = families.build(family, **({"query_scale": 0.25} if family == "gemma3" else {}))
    folder = save_own(tmp_path / "own", model.config, own_tree(model.config))
    convert(Settings(input=folder, output_dir=tmp_path / "out", layout="huggingface"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    tokens = families.tokens_of(model, (2, 9))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()
    found = model.apply({"params": families.params_of(model)}, tokens)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.peers
def test_transformers_opens_what_was_a_tree_of_t5x(tmp_path: pathlib.Path):
    transformers = pytest.importorskip("transformers", reason="extra peers")
    config = families.build("llama").config
    last = save_theirs(tmp_path / "in", config, own_tree(config))
    for name in ("orbax", "t5x", "safetensors"):
        convert(Settings(input=last, output_dir=tmp_path / name, format=name))
        last = tmp_path / name
    found = transformers.AutoModelForCausalLM.from_pretrained(last)
    assert found.config.eos_token_id == [2, 3] and found.generation_config.eos_token_id == 3
    stored = models.load(tmp_path / "in")
    for name, leaf in found.state_dict().items():
        np.testing.assert_array_equal(leaf.numpy(), stored[name])


def test_a_config_json_that_says_another_model_is_replaced(tmp_path: pathlib.Path):
    config = families.build("llama").config
    folder = save_own(tmp_path / "own", config, own_tree(config))
    stale = huggingface.to_json(config) | {"rope_theta": 7.0}
    (folder / "config.json").write_text(json.dumps(stale))
    settings = Settings(
        input=folder, output_dir=tmp_path / "out", layout="huggingface", output_dtype="bfloat16"
    )
    convert(settings)
    wanted = dataclasses.replace(config, param_dtype="bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text()) == huggingface.to_json(wanted)


def dotted(leaves: models.Model) -> models.Model:
    return {name.replace("/", "."): leaf for name, leaf in leaves.items()}


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_one_merge_of_both_trees(family: str, tmp_path: pathlib.Path):
    """Their base with experts of ours, and the reverse: the bits of the merge in the base's tree alone."""
    config = families.build(family, param_dtype="bfloat16").config
    unscanned = dataclasses.replace(config, scan_layers=False)
    ours = [own_tree(config, seed) for seed in range(4)]
    folders = [save_theirs(tmp_path / f"theirs_{i}", config, ours[i]) for i in range(4)]
    own = [save_own(tmp_path / f"own_{i}", config, ours[i]) for i in range(4)]
    convert(
        Settings(
            input=folders[1],
            output_dir=tmp_path / "o",
            layout="own(scan_layers=False)",
            format="orbax",
        )
    )
    spelled = dotted(arranged(huggingface.layout(unscanned), models.load(folders[3])))
    save(tmp_path / "bare", spelled)  # says nothing of itself: the base does
    stacked = tmp_path / "stacked"  # theirs, all layers of a parameter in one leaf
    convert(Settings(input=folders[3], output_dir=stacked, layout="stacked"))

    def merge(name: str, base: pathlib.Path, experts: list[pathlib.Path]) -> models.Model:
        merging.merge_checkpoints(
            base=base, experts=experts, method=DareTies(), output_dir=tmp_path / name
        )
        return load(tmp_path / name)

    wanted = merge("one", folders[0], folders[1:])
    mixed = merge("mixed", folders[0], [tmp_path / "o", folders[2], tmp_path / "bare"])
    assert models.same_bits(mixed, wanted)
    assert not (tmp_path / "mixed/model.json").exists() and beside(tmp_path / "mixed") == beside(
        folders[0]
    )
    wanted = merge("own", own[0], own[1:])
    mixed = merge("own_mixed", own[0], [folders[1], own[2], stacked])
    assert models.same_bits(mixed, wanted)
    assert model_file.read(tmp_path / "own_mixed").config == config


def test_tied_leaves_and_vocabulary_rows_between_the_trees(tmp_path: pathlib.Path):
    config = families.build("llama").config
    tied = dataclasses.replace(config, tied_embeddings=True, vocab_size=43)
    ours, expert = own_tree(config), own_tree(tied, seed=1)
    theirs = save_theirs(tmp_path / "theirs", config, ours)
    own = save_own(tmp_path / "own", tied, expert)
    untied = {"token_embedder/readout": expert["token_embedder/embedding"]}
    as_theirs = save_theirs(
        tmp_path / "expert", dataclasses.replace(tied, tied_embeddings=False), expert | untied
    )
    found = []
    for number, each in enumerate((own, as_theirs)):
        merging.merge_checkpoints(
            base=theirs,
            experts=[each],
            method=DareTies(),
            output_dir=tmp_path / f"out_{number}",
            tied={"lm_head.weight": huggingface.EMBEDDING},
            vocabulary_rows="common",
        )
        found.append(models.load(tmp_path / f"out_{number}"))
    assert models.same_bits(*found)
    assert not np.array_equal(found[0]["lm_head.weight"], models.load(theirs)["lm_head.weight"])


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("huggingface", "family palm.*of llama and gemma 3"),
        ("huggingface(axis=1)", "options are none"),
        ("own(axis=1)", "options are scan_layers"),
    ],
)
def test_what_has_no_such_tree_is_told(layout: str, told: str, tmp_path: pathlib.Path):
    config = families.build("palm").config
    folder = save_own(tmp_path / "own", config, own_tree(config))
    with pytest.raises(ValueError, match=f"(?s){told}"):
        convert(Settings(input=folder, output_dir=tmp_path / "out", layout=layout))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["own", "huggingface"])
def test_the_sizes_have_to_be_said(layout: str, tmp_path: pathlib.Path):
    save(tmp_path / "bare", own_tree(families.build("llama").config))
    with pytest.raises(
        ValueError, match="takes the model's sizes from a model.json or config.json"
    ):
        convert(Settings(input=tmp_path / "bare", output_dir=tmp_path / "out", layout=layout))


def test_other_trees_are_told_leaf_by_leaf(tmp_path: pathlib.Path):
    config = families.build("llama").config
    theirs = save_theirs(tmp_path / "theirs", config, own_tree(config))
    palm = families.build("palm").config
    own = save_own(tmp_path / "own", palm, own_tree(palm))
    with pytest.raises(ValueError, match=r"final_norm/scale float32\[32\] is not in the base"):
        merging.merge_checkpoints(
            base=theirs, experts=[own], method=DareTies(), output_dir=tmp_path / "out"
        )
