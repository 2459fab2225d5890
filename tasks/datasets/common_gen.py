"""CommonGen (Lin et al. 2020): a sentence of everyday life with all of some words in it."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import HuggingFace, JsonLines


def view(row: Row) -> Row:
    """The words with commas between; all sentences that are known for them count as right."""
    return {
        **row,
        "words": ", ".join(row["concepts"]),
        "sentences": tuple(row.get("targets") or (row["target"],)),
    }


DATASETS = (
    Dataset(
        name="common_gen",
        p3="common_gen",
        category="structure_to_text",
        metric="bleu",
        link="https://inklab.usc.edu/CommonGen/",
        fields=("concepts", "target"),
        view=view,
        view_fields=("words", "sentences"),
        prompts={
            "sentence": Generated(
                inputs="Make one sentence with these words in it: {words}.",
                targets="{target}",
                references="sentences",
            ),
            "scene": Generated(
                inputs="Words: {words}\nDescribe a scene of everyday life that has them all.\nScene:",
                targets="{target}",
                references="sentences",
            ),
            "caption": Generated(
                inputs="What could be written below a picture that shows {words}?",
                targets="{target}",
                references="sentences",
            ),
        },
        sources={
            "": HuggingFace(
                repository="allenai/common_gen",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 67_389, "validation": 4_018},
            ),
            "local": JsonLines(files="common_gen.jsonl.gz", columns="fields"),
        },
    ),
)
