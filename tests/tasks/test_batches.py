"""Batches are the same whatever the hosts, a stop, or how they are kept; none is lost and none comes twice."""

from __future__ import annotations

import collections
import gzip
import json
import pathlib

import numpy as np
import pytest

from tests.tasks.conftest import row


@pytest.fixture
def lengths(registered):
    from tasks import packing

    return packing.Lengths(inputs=180, targets=20)


MIXTURE = "sentiment_local"
ONE_TASK = "rotten_tomatoes_tone_local"  # where a mixture would show no more: each task read costs a tf.data pipeline


def pack(tmp_path: pathlib.Path, lengths, mixture: str = ONE_TASK, **arguments) -> pathlib.Path:
    from tasks import batches

    return batches.pack_mixture(mixture, cache_dir=tmp_path, lengths=lengths, **arguments)


def packed(folder: pathlib.Path, batch_size: int = 4, host: int = 0, hosts: int = 1, seed: int = 0):
    from tasks import batches

    share = batches.Share(batch_size=batch_size, host=host, hosts=hosts)
    return batches.PackedBatches(folder, share=share, seed=seed)


def streamed(lengths, host: int = 0, hosts: int = 1, position=None, chunk: int = 25):
    from tasks import batches, stream

    return batches.StreamedBatches(
        stream.Stream(ONE_TASK, lengths=lengths),
        share=batches.Share(batch_size=2, host=host, hosts=hosts),
        position=position,
        chunk=chunk,
    )


def equal(one, two) -> bool:
    return set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


def joined(parts) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def texts(batches_) -> collections.Counter:
    """Every example of some batches as text, "inputs -> targets"."""
    found = collections.Counter()
    for batch in batches_:
        for targets, segments, weights in zip(
            batch["targets"], batch["segment_ids"], batch["loss_weights"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                parts = (targets[(segments == segment) & (weights == w)] for w in (0, 1))
                found[
                    " -> ".join(bytes(int(t) - 3 for t in part if t > 2).decode() for part in parts)
                ] += 1
    return found


def every_example() -> collections.Counter:
    """What an epoch of the mixture must hold: each row in the words of each prompt, once."""
    from tasks import catalog

    found = collections.Counter()
    for name, train, first in (("rotten_tomatoes", 60, 0), ("review_sentences", 40, 500)):
        dataset = catalog.datasets()[name]
        for number in range(train):
            for prompt in dataset.prompts:
                example = dataset.render(prompt, row(first + number))
                found[f"{example.inputs} -> {example.targets}"] += 1
    return found


def test_an_epoch_holds_every_example_once(tmp_path: pathlib.Path, lengths):
    folder = pack(tmp_path, lengths, MIXTURE)
    rows = json.loads((folder / "index.json").read_text())["rows"]
    one = packed(folder, batch_size=1)
    epochs = [[one.batch(epoch * rows + step) for step in range(rows)] for epoch in (0, 1)]
    assert texts(epochs[0]) == texts(epochs[1]) == every_example()
    assert not all(map(equal, *epochs)), "every epoch has an order of its own"


def test_hosts_read_disjoint_rows_that_add_up(tmp_path: pathlib.Path, lengths):
    folder = pack(tmp_path, lengths)
    whole = packed(folder)
    for hosts in (2, 4):
        parts = [packed(folder, host=host, hosts=hosts) for host in range(hosts)]
        for step in (0, 1, 37, 1000):
            assert equal(joined([part.batch(step) for part in parts]), whole.batch(step))


def test_another_host_packs_the_same(tmp_path: pathlib.Path, lengths):
    one, two = pack(tmp_path / "a", lengths), pack(tmp_path / "b", lengths)
    assert one.name == two.name
    assert all(
        (one / name).read_bytes() == (two / name).read_bytes()
        for name in ("targets", "segment_ids", "kinds")
    )


def test_the_cache_is_made_once_for_each_seed_and_lengths(tmp_path: pathlib.Path, lengths):
    from tasks.packing import Lengths

    folder = pack(tmp_path, lengths)
    before = (folder / "index.json").stat().st_mtime_ns
    assert pack(tmp_path, lengths) == folder
    assert (folder / "index.json").stat().st_mtime_ns == before
    others = {
        pack(tmp_path, lengths, seed=1),
        pack(tmp_path, Lengths(inputs=180, targets=30)),
        pack(tmp_path, lengths, truncation="start"),
        pack(tmp_path, lengths, max_rows=3),
    }
    assert len(others | {folder}) == 5
    assert len(list(tmp_path.iterdir())) == 5, "nothing half made is left"
    indices = [json.loads((each / "index.json").read_text()) for each in others]
    assert min(index["rows"] for index in indices) == 3


def test_the_index_counts(tmp_path: pathlib.Path, lengths):
    from tasks.packing import Lengths

    index = json.loads((pack(tmp_path, lengths) / "index.json").read_text())
    assert (index["examples"], index["cut_inputs"], index["cut_targets"]) == (60, 0, 0)
    assert 0.7 < index["full"] <= 1
    short = json.loads((pack(tmp_path, Lengths(inputs=60, targets=4)) / "index.json").read_text())
    assert short["examples"] == 60
    assert 0 < short["cut_inputs"] < 60
    assert short["cut_targets"] == 60


def test_stopped_at_step_37_and_restored(registered, lengths):
    straight = streamed(lengths)
    wanted = [next(straight) for _ in range(50)]
    assert straight.position["epoch"] >= 2, "the test crosses epochs"
    two = [streamed(lengths, host, 2) for host in (0, 1)]
    for step in range(37):
        assert equal(joined([next(part) for part in two]), wanted[step])
    position = json.loads(json.dumps(two[0].position))
    assert position == two[1].position
    one = streamed(lengths, position=position)  # on another number of hosts
    for step in range(37, 50):
        assert equal(next(one), wanted[step])


def test_a_streamed_epoch_holds_every_example_once(registered, lengths):
    whole = streamed(lengths)
    rows = []
    while whole.position["epoch"] == 0:
        batch = next(whole)
        rows += [{name: array[i : i + 1] for name, array in batch.items()} for i in (0, 1)]
    rows = rows[: len(rows) - whole.position["row"]]  # the last batch reaches into the next epoch
    tone = {each for each in every_example() if "The tone of" in each and each in texts(rows)}
    assert set(texts(rows).values()) == {1}
    assert len(texts(rows)) == len(tone) == 60


def test_a_stretch_of_a_mixtures_epoch(registered, lengths):
    from tasks import stream

    read = stream.Stream(MIXTURE, lengths=lengths)
    whole = [tuple(each.inputs.tolist()) for each in read.take(0)]
    assert len(whole) == len(read) == 300
    assert [tuple(each.inputs.tolist()) for each in read.take(0, 120, 135)] == whole[120:135]


def test_a_mixture_without_rows_is_an_error(
    registered, tmp_path: pathlib.Path, lengths, monkeypatch: pytest.MonkeyPatch
):
    from tasks import stream

    row_ = {"id": "a", "split": "validation", "fields": row(0)}
    content = gzip.compress(json.dumps(row_).encode())
    (tmp_path / "rotten_tomatoes.jsonl.gz").write_bytes(content)
    with pytest.raises(stream.NoExamples, match=f"{ONE_TASK} has no train example"):
        registered(local_data=tmp_path)
        streamed(lengths)
    registered()
    monkeypatch.setattr(stream.Stream, "_read", lambda self, *which: iter(()))
    nothing = "has 60 train examples and none gives a row: its prompts passed over all"
    for position in (None, {"epoch": 2, "example": 50, "row": 0}):  # the rest of an epoch may be
        reader = streamed(lengths, position=position)
        with pytest.raises(stream.NoExamples, match=nothing):
            next(reader)
    assert reader.position["epoch"] == 3
    with pytest.raises(stream.NoExamples, match=nothing):
        pack(tmp_path, lengths)


def test_held_out_is_not_trained_on(registered, tmp_path: pathlib.Path, lengths):
    from tasks import batches

    with pytest.raises(ValueError, match="word_sense_local can't be trained on: it holds wic"):
        batches.pack_mixture("word_sense_local", cache_dir=tmp_path, lengths=lengths)
    with pytest.raises(ValueError, match="did you mean sentiment_local"):
        batches.pack_mixture("sentiments_local", cache_dir=tmp_path, lengths=lengths)
    with pytest.raises(ValueError, match=r"there is no file .*trec.jsonl.gz"):
        batches.pack_mixture("trec_asks_local", cache_dir=tmp_path, lengths=lengths)
    with pytest.raises(
        ValueError, match="no task of rotten_tomatoes_tone_local has a split 'test'"
    ):
        pack(tmp_path, lengths, split="test")
    with pytest.raises(ValueError, match="host 1 of 3 can't take an equal share of 4 rows"):
        batches.Share(batch_size=4, host=1, hosts=3)


def test_one_sequence_a_row_is_seqios_prefix_lm(registered, seqio_module, lengths):
    from tasks import packing

    task = seqio_module.TaskRegistry.get("rotten_tomatoes_tone_local")
    converter = seqio_module.PrefixLMFeatureConverter(pack=False)
    dataset = task.get_dataset(None, split="validation", shuffle=False).take(5)
    theirs = list(converter(dataset, {"inputs": 180, "targets": 20}).as_numpy_iterator())
    for features, their in zip(dataset.as_numpy_iterator(), theirs, strict=True):
        example = packing.truncate(features["inputs"], features["targets"], lengths=lengths)
        (one,) = packing.pack([example], length=lengths.row)
        ours = {
            k: v[0] for k, v in packing.batch(**packing.concatenated([one]), start_id=0).items()
        }
        assert ours["targets"].tolist() == their["decoder_target_tokens"].tolist()
        assert (
            ours["tokens"][: len(example)].tolist()
            == their["decoder_input_tokens"][: len(example)].tolist()
        )
        assert ours["loss_weights"].tolist() == their["decoder_loss_weights"].tolist()
        assert (
            ours["prefix_mask"].tolist() == their["decoder_causal_attention"].astype(bool).tolist()
        )


class TestEvaluationSets:
    """Choices as many as there are, inputs of any length, and what was cut."""

    def test_ranked(self, registered, lengths):
        from tasks import evaluation

        found = evaluation.evaluation_set("rotten_tomatoes_tone_local", lengths=lengths)
        assert (len(found.examples), found.chance, found.majority) == (20, 0.5, 0.5)
        first = found.examples[0]
        assert first.id == "rotten_tomatoes-60"
        assert [found.vocabulary.decode(each.tolist()) for each in first.choices] == list(
            first.choices_text
        )
        assert all(each[-1] == found.vocabulary.eos_id for each in first.choices)
        assert found.truths == [i % 2 for i in range(20)]
        assert found.metric.function(found.truths, found.truths)["accuracy"] == 1

    def test_a_sample(self, registered, lengths):
        from tasks import evaluation

        def ids(seed: int, limit: int) -> list[str]:
            found = evaluation.evaluation_set(
                "rotten_tomatoes_tone_local", lengths=lengths, limit=limit, seed=seed
            )
            return [each.id for each in found.examples]

        assert len(set(ids(0, 7))) == 7
        assert ids(0, 7) == ids(0, 7) != ids(1, 7)
        assert ids(0, 7)[:3] == ids(0, 3)

    def test_unequal_choices_empty_inputs_and_truncation(
        self, registered, seqio_module, lengths, monkeypatch: pytest.MonkeyPatch
    ):
        from tasks import evaluation
        from tasks.dataset import Dataset, Ranked
        from tasks.packing import Lengths
        from tasks.sources import Function

        rows = [
            {"text": "", "options": [f"a{'b' * i}" for i in range(14)], "label": 13},
            {"text": "0123456789", "options": ["a", "a b"], "label": 0},
            {"text": "01234", "options": ["yes, very much", "yes", "no"], "label": 2},
        ]
        dataset = Dataset(
            name="odd",
            category="sentiment",
            metric="accuracy",
            fields=("text", "options", "label"),
            prompts={"plain": Ranked(inputs="{text}", choices="options")},
            sources={"": Function(rows=lambda split: rows)},
        )
        monkeypatch.setattr("tasks.catalog.datasets", lambda: {"odd": dataset})
        registered(rate_cap=7)
        try:
            for rule, kept in (("end", "01234"), ("start", "56789")):
                found = evaluation.evaluation_set(
                    "odd_plain", lengths=Lengths(inputs=5, targets=8), truncation=rule
                )
                assert [len(each.choices) for each in found.examples] == [14, 2, 3]
                assert [len(each.inputs) for each in found.examples] == [0, 5, 5]
                assert bytes(t - 3 for t in found.examples[1].inputs.tolist()).decode() == kept
                assert (found.cut_inputs, found.cut_targets) == (1, 2)
                assert max(len(c) for each in found.examples for c in each.choices) == 8
                assert found.chance == pytest.approx((1 / 14 + 1 / 2 + 1 / 3) / 3)
        finally:
            monkeypatch.undo()
            registered()

    def test_a_malformed_row_is_told_with_file_and_line(
        self, registered, lengths, tmp_path: pathlib.Path
    ):
        from tasks import evaluation, stream

        good = {"text": "Who sings ?", "label_coarse": 3}
        rows = [good, good, {"text": "Who ?"}], [good, {"text": "Who ?", "label_coarse": None}]
        lines = [
            json.dumps({"split": split, "fields": fields})
            for split, of_split in zip(("validation", "train"), rows, strict=True)
            for fields in of_split
        ]
        lines.insert(1, "")  # an empty line counts as one
        (tmp_path / "trec.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        registered(local_data=tmp_path)
        try:
            wanted = r"trec\.jsonl\.gz, line 4: a row of trec has no field 'label_coarse', .* found: split, text$"
            with pytest.raises(ValueError, match=wanted):
                evaluation.evaluation_set("trec_asks_local", lengths=lengths)
            read = stream.Stream("trec_asks_local", lengths=lengths)
            with pytest.raises(ValueError, match=r"gz, line 6: prompt 'asks' of trec: TypeError: "):
                list(read.take(0))
        finally:
            registered()

    def test_errors(self, registered, lengths):
        from tasks import evaluation

        with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
            evaluation.evaluation_set("trec_asks_local", lengths=lengths, split="test")
        with pytest.raises(ValueError, match="did you mean"):
            evaluation.evaluation_set("trec_ask_local", lengths=lengths)
