"""A world in plain English, made from a seed, in which every category of the study has its datasets.

People live, work, meet, give and take; small things follow from small things; words mean what they mean. A
transformer of a million parameters learns the language from the corpus within minutes, an expert learns a category
from its questions, and the held-out categories can be answered by what both have learnt: a statement follows from a
passage by the same converses that make two sentences paraphrases, a pronoun is resolved by who did what, an ending
by cause and effect. No single word, position or length gives a held-out answer away
(tests/tasks/miniature/bag_of_words.py).

Pure Python, nothing downloaded, nothing stored: a row is made when it is asked for, from (dataset, split, seed,
index) alone.
"""

from __future__ import annotations

from tasks.miniature.corpus import documents
from tasks.miniature.generators import rows
from tasks.miniature.vocabulary import vocabulary, words

__all__ = ["documents", "rows", "vocabulary", "words"]
