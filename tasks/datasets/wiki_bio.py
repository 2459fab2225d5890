"""WikiBio (Lebret et al. 2016): the first sentences of a biography, from the table beside it."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import Tfds


def view(row: Row) -> Row:
    """The table as lines "column: content", without what is empty."""
    table = row["input_text"]["table"]
    cells = zip(table["column_header"], table["content"], strict=True)
    facts = [
        f"{name.replace('_', ' ')}: {' '.join(content.split())}"
        for name, content in cells
        if content.strip() not in ("", "<none>")
    ]
    return {
        "name": " ".join(row["input_text"]["context"].split()),
        "facts": "\n".join(facts),
        "biography": " ".join(row["target_text"].split()),
    }


DATASETS = (
    Dataset(
        name="wiki_bio",
        p3="wiki_bio",
        category="structure_to_text",
        metric="bleu",
        link="https://github.com/DavidGrangier/wikipedia-biography-dataset",
        fields=("input_text", "target_text"),
        view=view,
        view_fields=("name", "facts", "biography"),
        prompts={
            "begin": Generated(
                inputs="{facts}\n\nBegin an article on {name} with what these notes say.",
                targets="{biography}",
            ),
            "who": Generated(inputs="Notes:\n{facts}\n\nWho is {name}?", targets="{biography}"),
            "biography": Generated(
                inputs="Turn a table into a short biography.\n\nTable:\n{facts}\n\nBiography:",
                targets="{biography}",
            ),
        },
        sources={
            "": Tfds(
                name="wiki_bio:0.1.0",
                splits={"train": "train", "validation": "val"},
                sizes={"train": 582_659, "validation": 72_831},
            ),
        },
    ),
)
