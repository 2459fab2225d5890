"""What judges a study, and what its settings are chosen by."""

from __future__ import annotations

import pytest

from launch.study_data import Sources, study_data

SOURCES = Sources(
    collection="mini", lengths={"inputs": 96, "targets": 32}, limit=4, num_prompts=1, tuning_limit=3
)


def ids(tasks) -> dict[str, list[str]]:
    return {task.name: [example.id for example in task.examples] for task in tasks}


@pytest.mark.slow
def test_settings_are_chosen_by_held_in_examples_that_judge_nobody():
    data = study_data(SOURCES, {})
    judging, identity = data.tasks(True)
    choosing, of_choice = data.tuning_tasks()
    judged, chosen_by = ids(judging), ids(choosing)
    roles = {
        task: each.role
        for each in data.categories.values()
        for dataset in each.datasets.values()
        for task in dataset.tasks
    }
    assert {roles[name] for name in chosen_by} == {"held_in"}
    assert {len(found) for found in chosen_by.values()} == {3}
    assert {len(found) for found in judged.values()} == {4}
    for name, found in chosen_by.items():
        assert not set(found) & set(judged[name]), name

    # Without choices the same examples lead, and held-out ones are the same either way.
    plain, plain_identity = data.tasks(False)
    for name, found in ids(plain).items():
        if roles[name] == "held_out":
            assert found == judged[name]
        else:
            assert found == [*chosen_by[name], *judged[name]][:4]
    assert len({repr(each) for each in (identity, plain_identity, of_choice)}) == 3
