"""MRPC (Dolan and Brockett 2005), as GLUE has it: do two sentences of the news say the same?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines, Tfds

DATASETS = (
    Dataset(
        name="mrpc",
        p3="glue/mrpc",
        category="paraphrase",
        metric="accuracy_and_f1",
        link="https://gluebenchmark.com/",
        aliases=("glue/mrpc",),
        fields=("sentence1", "sentence2", "label"),
        prompts={
            "same": Ranked(
                inputs="First: {sentence1}\nSecond: {sentence2}\nDo the two sentences say the same?",
                choices=("no", "yes"),
            ),
            "replace": Ranked(
                inputs='Could "{sentence1}" be replaced with "{sentence2}" without a change of meaning?',
                choices=("No", "Yes"),
            ),
            "label": Ranked(
                inputs="A: {sentence1}\nB: {sentence2}\nA and B are equivalent or different:",
                choices=("different", "equivalent"),
            ),
        },
        sources={
            "": Tfds(
                name="glue/mrpc:2.0.0",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 3_668, "validation": 408},
            ),
            "local": JsonLines(files="mrpc.jsonl.gz", columns="fields"),
        },
    ),
)
