"""One invented row of every dataset, as its sources give it."""

from __future__ import annotations

from typing import Any

from tasks import sources

QA = {"text": ["the red boat", "a red boat"], "answer_start": [4, 4]}

ROWS: dict[str, dict[str, Any]] = {
    "dream": {
        "dialogue": ["W: Is the kettle on?", "M: It boils."],
        "question": "What boils?",
        "choice": ["A lake.", "The water.", "An egg."],
        "answer": "The water.",
    },
    "cosmos_qa": {
        "context": "It rained, so we stayed in.",
        "question": "Why did they stay in?",
        "answer0": "They were ill.",
        "answer1": "To stay dry.",
        "answer2": "It was late.",
        "answer3": "None of these.",
        "label": 1,
    },
    "adversarial_qa_dbidaf": {
        "context": "Ada rowed the red boat.",
        "question": "What was rowed?",
        "answers": QA,
    },
    "ropes": {
        "background": "Oil floats on water.",
        "situation": "Tom pours oil on water and Ann pours milk.",
        "question": "Whose liquid floats?",
        "answers": {"text": ["Tom's"]},
    },
    "hotpotqa": {
        "input": "Which river is longer, the Blue or the Grey?",
        "output": [{"answer": "the Grey"}, {"answer": ""}, {"answer": "Grey"}],
    },
    "wiki_qa": {
        "question": "how tall is the old tower",
        "answer": "The tower stands 40 metres high.",
        "document_title": "Old tower",
        "label": 1,
    },
    "app_reviews": {"review": "Crashes often", "package_name": "org.example.clock", "star": 2},
    "imdb": {"text": "A film of rare charm.", "label": 1},
    "ag_news": {"text": "The cup final went to extra time.", "label": 1},
    "dbpedia_14": {"title": "Brook", "content": " Brook is a novel of 1901.", "label": 13},
    "common_gen": {
        "concepts": ["dog", "park", "run"],
        "target": "The dog runs in the park.",
        "targets": ["The dog runs in the park.", "Dogs run at the park."],
    },
    "wiki_bio": {
        "input_text": {
            "table": {
                "column_header": ["name", "birth_date", "image"],
                "row_number": [1, 1, 1],
                "content": ["ada  lum", "1 may 1900", "<none>"],
            },
            "context": "ada lum \n",
        },
        "target_text": "ada lum was born\nin 1900 .\n",
    },
    "cnn_dailymail": {
        "article": "A long story about a bridge.",
        "highlights": "Bridge opens.\nMany come.",
    },
    "xsum": {"document": "A story about a bridge.", "summary": "A bridge has opened."},
    "mrpc": {"sentence1": "It snowed.", "sentence2": "Snow fell.", "label": 1},
    "qqp": {"question1": "How do I knit?", "question2": "How do I bake?", "label": 0},
    "copa": {
        "premise": "The glass fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": "effect",
        "label": 0,
    },
    "hellaswag": {
        "ctx": "A man opens a tin. He",
        "endings": ["eats it.", "flies off.", "is a tin.", "sings."],
        "label": "0",
    },
    "anli_r1": {"premise": "Ada is in Rome.", "hypothesis": "Ada is in Italy.", "label": 0},
    "rte": {"premise": "Ada is in Rome.", "hypothesis": "Ada is in Paris.", "label": 1},
    "cb": {"premise": "I doubt it rains.", "hypothesis": "it rains", "label": 2},
    "wsc": {
        "text": "Ada saw Bea. She waved.",
        "span1_text": "Ada",
        "span2_text": "She",
        "span1_index": 0,
        "span2_index": 3,
        "label": 1,
    },
    "winogrande": {
        "sentence": "Ada beat Bea because _ was faster.",
        "option1": "Ada",
        "option2": "Bea",
        "answer": "1",
    },
    "wic": {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank loan.", "label": 0},
    "openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold", "alive", "loud"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "squad": {
        "context": "Ada rowed the red boat.",
        "question": "What was rowed?",
        "target": "the red boat",
        "targets": ["the red boat", "red boat"],
    },
    "web_questions": {
        "question": "who wrote brook?",
        "target": "Ada Lum",
        "targets": ["Ada Lum", "A. Lum"],
    },
    "rotten_tomatoes": {"text": "dull and long .", "label": 0},
    "trec": {"text": "Who wrote Brook ?", "label_coarse": 3},
    "web_nlg": {
        "triples": ['Ada_Lum | birthYear | "1900"', "Ada_Lum | profession | Writer"],
        "target": "Ada Lum, a writer, was born in 1900.",
        "targets": ["Ada Lum, a writer, was born in 1900."],
    },
    "dialogsum": {
        "dialogue": "#Person1#: Tea?\n#Person2#: Please.",
        "target": "#Person2# takes tea.",
        "targets": ["#Person2# takes tea.", "#Person1# offers tea."],
    },
    "scitldr": {
        "source": ["We sort. ", " It is fast."],
        "target": "A fast sort.",
        "targets": ["A fast sort."],
    },
    "paws": {"sentence1": "A beat B .", "sentence2": "B beat A .", "label": 0},
}
SAME = {
    "adversarial_qa_dbert": "adversarial_qa_dbidaf",
    "adversarial_qa_droberta": "adversarial_qa_dbidaf",
    "anli_r2": "anli_r1",
    "anli_r3": "anli_r1",
    "subjqa": "squad",
    "nq_open": "web_questions",
    "review_sentences": "rotten_tomatoes",
}
ROWS |= {name: ROWS[same] for name, same in SAME.items()}


def is_tfds(source: sources.Source) -> bool:
    return isinstance(source, sources.Tfds)
