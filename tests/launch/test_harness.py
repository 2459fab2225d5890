"""lm-evaluation-harness on our models beside its own `hf` backend: a task of each kind of request, defined here."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from launch import devices, evaluate

pytestmark = [pytest.mark.real, pytest.mark.peers, pytest.mark.slow]

COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\nvalidation_split: validation\n"
TASKS = {
    "ranked": """
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
    "written": """
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}
ROWS = 8


@pytest.fixture(scope="module")
def checkpoint(real_checkpoints: pathlib.Path) -> pathlib.Path:
    pytest.importorskip("lm_eval", reason="needs the extra `peers`")
    folder = real_checkpoints / "smollm2"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


@pytest.fixture
def definitions(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder of tasks, and of what they ask."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = "The cat that my sister found sleeps on the old red chair by the door".split()
    rows = [
        {"question": " ".join(words[: 5 + n]), "choices": [" ".join(words[5 + n : 6 + n + k]) for k in range(2 + n % 2)],
         "label": n % 2}
        for n in range(ROWS)
    ]  # fmt: skip
    folder = tmp_path / "definitions"
    folder.mkdir()
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, more in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + (COMMON + more).format(data=data))
    return folder


def tokenizer(checkpoint: pathlib.Path) -> Any:
    """The checkpoint's for transformers: where no tokenizer_config.json lies beside it, config.json says start and end."""
    import transformers

    file = str(checkpoint / "tokenizer.json")
    config = json.loads((checkpoint / "config.json").read_text())
    known = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    known.bos_token, known.eos_token = known.convert_ids_to_tokens(
        [config["bos_token_id"], config["eos_token_id"]]
    )
    return known


def ours(checkpoint: pathlib.Path, output: pathlib.Path, folder: pathlib.Path, **how: Any) -> Any:
    given = {
        "INITIAL_CHECKPOINT_PATH": str(checkpoint),
        "OUTPUT_DIR": str(output),
        "MIXTURE_OR_TASK_NAME": list(TASKS),
        "DTYPE": "float32",
        "PARAM_DTYPE": "float32",
        "SHAPES": 1,
    }
    bindings = [f"{k} = {v!r}" for k, v in given.items()]
    bindings += [
        "MESH = @MeshShape()",
        f"MeshShape.fsdp = {jax.device_count()}",
    ]  # one copy in memory
    resolved = evaluate.configured([evaluate.RUN_FILE], bindings)
    return evaluate.harness_evaluate(resolved, devices.Processes(), str(folder), **how)


def test_numbers_are_those_of_its_own_backend(
    checkpoint: pathlib.Path,
    definitions: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    output = tmp_path / "out"
    assert ours(checkpoint, output, definitions, is_dry_run=True) is None
    assert not output.exists()

    simple_evaluate, kept = lm_eval.simple_evaluate, []

    def with_samples(*arguments: Any, **named: Any) -> dict[str, Any]:
        kept.append(simple_evaluate(*arguments, **named | {"log_samples": True}))
        return kept[-1]

    monkeypatch.setattr(lm_eval, "simple_evaluate", with_samples)
    found = ours(checkpoint, output, definitions)["smollm2"]
    assert "|ranked |" in capsys.readouterr().out
    theirs = with_samples(
        HFLM(
            pretrained=str(checkpoint),
            tokenizer=tokenizer(checkpoint),
            device="cpu",
            dtype="float32",
            batch_size=4,
            # Its cache takes a context that is another one with the beginning of its continuation for the same.
            logits_cache=False,
        ),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        bootstrap_iters=1_000,
    )
    for task in TASKS:
        mine, wanted = ([each["filtered_resps"] for each in run["samples"][task]] for run in kept)
        assert len(mine) == ROWS
        for a, b in zip(mine, wanted, strict=True):
            if task == "written":
                assert a == b
            elif task == "whole":
                np.testing.assert_allclose(a, b, atol=1e-3)
            else:
                np.testing.assert_allclose([x for x, _ in a], [x for x, _ in b], atol=1e-3)
                assert [x for _, x in a] == [x for _, x in b]
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)

    def is_not_called(*arguments: Any, **named: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(lm_eval, "simple_evaluate", is_not_called)
    assert set(ours(checkpoint, output, definitions)["smollm2"]) == set(TASKS)  # done before
    (definitions / "ranked.yaml").write_text(
        (definitions / "ranked.yaml").read_text() + "\n# other\n"
    )
    with pytest.raises(ValueError, match="differs in tasks"):
        ours(checkpoint, output, definitions)


def test_a_task_that_is_not_there_is_named(
    checkpoint: pathlib.Path, definitions: pathlib.Path, tmp_path: pathlib.Path
):
    (definitions / "written.yaml").unlink()
    with pytest.raises(ValueError, match=r"definitions has no task written"):
        ours(checkpoint, tmp_path / "out", definitions)
