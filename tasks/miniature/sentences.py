"""Sentences that several datasets and the corpus have in common."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import FEMALE, MALE

FILLERS = (
    "it was a warm day.",
    "the sky was blue.",
    "birds sang in the trees.",
    "the wind was cold.",
    "it was late.",
    "there was snow on the hill.",
)
TIMES = ("today", "one day", "last night", "on monday", "on friday", "on sunday")


def told(sentences: list[str]) -> str:
    """Sentences as one text; each gets its full stop where it has none."""
    return " ".join(s if s.endswith((".", "?")) else f"{s}." for s in sentences)


def same_gender(draw: Draw, n: int) -> list[str]:
    """n different people of one gender, whom a pronoun cannot tell apart."""
    return draw.some(draw.pick((FEMALE, MALE)), n)
