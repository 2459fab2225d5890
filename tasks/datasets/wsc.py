"""The Winograd schema challenge, as SuperGLUE has it (`wsc.fixed`): whom does a pronoun mean?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines, Tfds

DATASETS = (
    Dataset(
        name="wsc",
        p3="super_glue/wsc.fixed",
        category="coreference",
        metric="accuracy",
        link="https://super.gluebenchmark.com/",
        aliases=("super_glue/wsc", "wsc.fixed", "wsc273", "winograd", "winograd_wsc", "wnli"),
        fields=("text", "span1_text", "span2_text", "label"),
        prompts={
            "means": Ranked(
                inputs='{text}\n\nIn this text, does the word "{span2_text}" mean {span1_text}?',
                choices=("no", "yes"),
            ),
            "replace": Ranked(
                inputs='{text}\nOne could write "{span1_text}" in place of "{span2_text}", and nothing would change.'
                " True or false?",
                choices=("false", "true"),
            ),
            "same": Ranked(
                inputs='Text: {text}\n"{span2_text}" and "{span1_text}" are',
                choices=("not the same", "the same"),
            ),
        },
        sources={
            "": Tfds(
                name="super_glue/wsc.fixed:1.0.2",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 554, "validation": 104},
            ),
            "local": JsonLines(files="wsc.jsonl.gz", columns="fields"),
        },
    ),
)
