"""WebNLG 2017 (Gardent et al.): a text from facts. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """Facts as lines "subject: relation: object"; all known texts count as right."""
    facts = [
        each.replace("_", " ").replace(" | ", ": ").replace('"', "") for each in row["triples"]
    ]
    return {"facts": "\n".join(facts), "text": row["target"], "texts": tuple(row["targets"])}


DATASETS = (
    Dataset(
        name="web_nlg",
        category="structure_to_text",
        metric="bleu",
        link="https://gitlab.com/shimorina/webnlg-dataset",
        fields=("triples", "target", "targets"),
        view=view,
        view_fields=("facts", "text", "texts"),
        prompts={
            "say": Generated(
                inputs="{facts}\n\nSay all this in plain sentences.",
                targets="{text}",
                references="texts",
            ),
            "facts": Generated(
                inputs="Facts:\n{facts}\nText:", targets="{text}", references="texts"
            ),
            "write": Generated(
                inputs="Write a short text from these notes, and leave none of them out.\n{facts}",
                targets="{text}",
                references="texts",
            ),
        },
        sources={"local": JsonLines(files="web_nlg.jsonl.gz", columns="fields")},
    ),
)
