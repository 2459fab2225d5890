"""RTE, as SuperGLUE has it: does a text entail a sentence?"""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines, Tfds

DATASETS = (
    Dataset(
        name="rte",
        p3="super_glue/rte",
        category="natural_language_inference",
        metric="accuracy",
        link="https://super.gluebenchmark.com/",
        aliases=("glue/rte", "super_glue/rte", "recognizing_textual_entailment"),
        fields=("premise", "hypothesis", "label"),
        view=wordings.stated,
        prompts={
            "follows": Ranked(
                inputs="{premise}\n\nDoes it follow that {hypothesis}?", choices=("yes", "no")
            ),
            "given": Ranked(
                inputs='Take this as given: {premise}\nIs it true, then, to say "{hypothesis}"?',
                choices=("Yes", "No"),
            ),
            "label": Ranked(
                inputs="Premise: {premise}\nHypothesis: {hypothesis}\nThe premise entails it or does not entail it:",
                choices=("entails it", "does not entail it"),
            ),
        },
        sources={
            "": Tfds(
                name="super_glue/rte:1.0.2",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 2_490, "validation": 277},
            ),
            "local": JsonLines(files="rte.jsonl.gz", columns="fields"),
        },
    ),
)
