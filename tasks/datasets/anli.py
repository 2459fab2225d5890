"""Adversarial NLI (Nie et al. 2020): three rounds, each a dataset, whose mean is the dataset's score."""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset, Ranked
from tasks.sources import HuggingFace, JsonLines


def round_of(number: int, train: int, validation: int) -> Dataset:
    """The dataset of one round."""
    sources = {
        "": HuggingFace(
            repository="facebook/anli",
            config="plain_text",
            splits={"train": f"train_r{number}", "validation": f"dev_r{number}"},
            sizes={"train": train, "validation": validation},
        )
    }
    if number == 1:
        sources["local"] = JsonLines(
            files="anli_r1.jsonl.gz", columns="fields", splits=("validation",)
        )
    return Dataset(
        name=f"anli_r{number}",
        part_of="anli",
        p3="anli",
        category="natural_language_inference",
        metric="accuracy",
        link="https://github.com/facebookresearch/anli",
        aliases=("anli", "adversarial_nli"),
        fields=("premise", "hypothesis", "label"),
        view=wordings.stated,
        prompts={
            "follows": Ranked(
                inputs="{premise}\n\nDoes it follow that {hypothesis}?",
                choices=("yes", "maybe", "no"),
            ),
            "given": Ranked(
                inputs='Take this as given: {premise}\nIs it true, then, to say "{hypothesis}"?',
                choices=("Yes", "Maybe", "No"),
            ),
            "label": Ranked(
                inputs="Premise: {premise}\nHypothesis: {hypothesis}\nThe premise entails it, leaves it open, or contradicts it:",
                choices=("entails it", "leaves it open", "contradicts it"),
            ),
        },
        sources=sources,
    )


DATASETS = (round_of(1, 16_946, 1_000), round_of(2, 45_460, 1_000), round_of(3, 100_459, 1_200))
