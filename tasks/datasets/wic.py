"""WiC (Pilehvar and Camacho-Collados 2019): is a word used in one sense in two sentences?"""

from __future__ import annotations

from tasks.dataset import Dataset, Ranked
from tasks.sources import JsonLines, Tfds

DATASETS = (
    Dataset(
        name="wic",
        p3="super_glue/wic",
        category="word_sense",
        metric="accuracy",
        link="https://pilehvar.github.io/wic/",
        aliases=("super_glue/wic", "word_in_context", "words_in_context"),
        fields=("word", "sentence1", "sentence2", "label"),
        prompts={
            "same": Ranked(
                inputs='{sentence1}\n{sentence2}\n\nDoes "{word}" mean the same in both sentences?',
                choices=("no", "yes"),
            ),
            "dictionary": Ranked(
                inputs='A dictionary lists the senses of "{word}". Would these two uses stand under one of them?'
                "\n- {sentence1}\n- {sentence2}\nYes or no:",
                choices=("No", "Yes"),
            ),
            "senses": Ranked(
                inputs="Word: {word}\nFirst use: {sentence1}\nSecond use: {sentence2}\nThe senses are",
                choices=("different", "the same"),
            ),
        },
        sources={
            "": Tfds(
                name="super_glue/wic:1.0.2",
                splits={"train": "train", "validation": "validation"},
                sizes={"train": 5_428, "validation": 638},
            ),
            "local": JsonLines(files="wic.jsonl.gz", columns="fields"),
        },
    ),
)
