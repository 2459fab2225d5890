"""DialogSum (Chen et al. 2021): what was said in a dialogue. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """All known summaries count as right."""
    return {**row, "summary": row["target"], "summaries": tuple(row["targets"])}


DATASETS = (
    Dataset(
        name="dialogsum",
        category="summarization",
        metric="rouge",
        link="https://github.com/cylnlp/dialogsum",
        fields=("dialogue", "target", "targets"),
        view=view,
        view_fields=("summary", "summaries"),
        prompts={
            "talk": Generated(
                inputs="{dialogue}\n\nWhat was this talk about?",
                targets="{summary}",
                references="summaries",
            ),
            "report": Generated(
                inputs="Report in a sentence or two what is said here.\n\n{dialogue}\n\nReport:",
                targets="{summary}",
                references="summaries",
            ),
            "summary": Generated(
                inputs="Dialogue: {dialogue}\n\nSummary:",
                targets="{summary}",
                references="summaries",
            ),
        },
        sources={"local": JsonLines(files="dialogsum.jsonl.gz", columns="fields")},
    ),
)
