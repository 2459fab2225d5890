"""CommitmentBank (de Marneffe et al. 2019), as SuperGLUE has it: is the writer committed to a sentence?

Scored, but not counted among the study's datasets.
"""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset, Ranked
from tasks.sources import Tfds

DATASETS = (
    Dataset(
        name="cb",
        p3="super_glue/cb",
        category="natural_language_inference",
        metric="accuracy",
        is_counted=False,
        link="https://super.gluebenchmark.com/",
        aliases=("super_glue/cb", "commitmentbank", "commitment_bank"),
        fields=("premise", "hypothesis", "label"),
        view=wordings.stated,
        prompts={
            "follows": Ranked(
                inputs="{premise}\n\nDoes it follow that {hypothesis}?",
                choices=("yes", "no", "maybe"),
            ),
            "given": Ranked(
                inputs='Take this as given: {premise}\nIs it true, then, to say "{hypothesis}"?',
                choices=("Yes", "No", "Maybe"),
            ),
            "label": Ranked(
                inputs="Premise: {premise}\nHypothesis: {hypothesis}\nThe premise entails it, contradicts it, or leaves it open:",
                choices=("entails it", "contradicts it", "leaves it open"),
            ),
        },
        sources={
            "": Tfds(
                name="super_glue/cb:1.0.2",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 250, "validation": 56},
            ),
        },
    ),
)
