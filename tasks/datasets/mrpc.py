"""MRPC (Dolan and Brockett 2005), as GLUE has it: do two sentences of the news say the same?"""

from __future__ import annotations

from tasks import wordings
from tasks.dataset import Dataset
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
        prompts=wordings.SAME_MEANING,
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
