"""SciTLDR (Cachola et al. 2020): an abstract in one sentence. Stands in for a set of the study."""

from __future__ import annotations

from tasks.dataset import Dataset, Generated, Row
from tasks.sources import JsonLines


def view(row: Row) -> Row:
    """The abstract as one paragraph; all known summaries count as right."""
    return {
        "abstract": " ".join(" ".join(row["source"]).split()),
        "summary": row["target"],
        "summaries": tuple(row["targets"]),
    }


DATASETS = (
    Dataset(
        name="scitldr",
        category="summarization",
        metric="rouge",
        link="https://github.com/allenai/scitldr",
        fields=("source", "target", "targets"),
        view=view,
        view_fields=("abstract", "summary", "summaries"),
        prompts={
            "claim": Generated(
                inputs="{abstract}\n\nThe contribution of this paper in one sentence:",
                targets="{summary}",
                references="summaries",
            ),
            "colleague": Generated(
                inputs="A colleague asks what this paper does. Answer in a sentence.\n\nAbstract: {abstract}\n\nAnswer:",
                targets="{summary}",
                references="summaries",
            ),
            "summary": Generated(
                inputs="Abstract: {abstract}\n\nSummary in one sentence:",
                targets="{summary}",
                references="summaries",
            ),
        },
        sources={"local": JsonLines(files="scitldr.jsonl.gz", columns="fields")},
    ),
)
