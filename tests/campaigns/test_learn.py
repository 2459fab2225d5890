"""The judgement of small models, on scores made by hand."""

from __future__ import annotations

from merging.evaluation.collect import Score
from tests.campaigns.learn import Part, expert_of, judge, values_of

PARTS = [
    Part(category="sentiment", is_ranked=True, datasets=["plays", "goods"], chance=0.3, majority=0.5),
    Part(category="lists", is_ranked=False, datasets=["lives"], chance=0.0, majority=0.1),
]  # fmt: skip
NAMES = {"untrained": "untrained", "pretrained": "pretrained", "instructed": "instructed"}


def score(model: str, task: str, value: float, prompt: str = "a", metric: str = "accuracy"):
    return Score(
        model=model, task=task, prompt=prompt, metric=metric, value=value, stderr=0.0, count=1, chance=None, seconds=0.0
    )  # fmt: skip


def test_scores_are_means_over_prompts_of_the_main_metric():
    scores = [
        score("m", "plays_mini", 0.2),
        score("m", "plays_mini", 0.4, prompt="b"),
        score("m", "plays_mini", 0.9, metric="f1"),
        score("m", "held_out_mini", 0.9),
    ]
    found = values_of(scores, {"plays": "accuracy"})
    assert found.keys() == {"m"} and found["m"].keys() == {"plays"}
    assert abs(found["m"]["plays"] - 0.3) < 1e-12
    assert expert_of("pretrained_sentiment_mini", ["lists", "sentiment"]) == "sentiment"
    assert expert_of("pretrained", ["lists", "sentiment"]) is None


def judged(**changes: dict[str, float]) -> list[bool]:
    bases = {
        "untrained": {"plays": 0.5, "goods": 0.5, "lives": 0.02},
        "pretrained": {"plays": 0.5, "goods": 0.5, "lives": 0.02},
        "instructed": {"plays": 0.5, "goods": 0.6, "lives": 0.01},
        "expert_sentiment": {"plays": 0.55, "goods": 0.65},
        "expert_lists_mini": {"lives": 0.04},
    }
    return [holds for holds, _ in judge(bases | changes, PARTS, **NAMES)]


def test_ten_points_above_guessing_and_twice_the_untrained():
    assert judged() == [True, True, False]  # 1 of 2 categories is fewer than 6
    assert judged(expert_sentiment={"plays": 0.55, "goods": 0.64}) == [False, True, False]
    assert judged(expert_lists_mini={"lives": 0.039}) == [True, False, False]
    assert judged(expert_sentiment={"plays": 0.9}) == [False, True, False]  # one is missing
    nothing = {"untrained": {"lives": 0.0}, "expert_lists_mini": {"lives": 0.0}}
    assert judged(**nothing) == [True, False, False]


def test_the_instructed_base_is_to_win_six_categories():
    many = [
        Part(category=f"c{i}", is_ranked=True, datasets=[f"d{i}"], chance=0.0, majority=0.0)
        for i in range(8)
    ]
    before = {f"d{i}": 0.5 for i in range(8)}
    for wins, holds in ((5, False), (6, True)):
        after = {f"d{i}": 0.6 if i < wins else 0.5 for i in range(8)}
        values = {"pretrained": before, "instructed": after, "x_c0": {"d0": 0.5}}
        (_, (found, told)) = judge(values, many, **NAMES)
        assert found == holds and f"in {wins} of 8" in told
