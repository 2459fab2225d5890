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


def converse(
    draw: Draw, *, a: str, b: str, thing: str, forms: tuple[str, str], same: bool
) -> tuple[str, str]:
    """Two sentences of different wording on what `a` and `b` have to do with each other; `same` if they agree.

    The verb is the same or its converse and the names stand in either order in both cases, so that no word tells.
    """
    first, second = draw.some((0, 1), 2)
    if draw.heads():  # the other verb: agrees if the roles are kept
        roles = (a, b) if same else (b, a)
    else:  # the same verb: a sentence would agree only with itself, so the time moves
        second = first
        roles = (a, b) if same else (b, a)
    one = forms[first].format(a=a, b=b, t=thing)
    two = forms[second].format(a=roles[0], b=roles[1], t=thing)
    time = draw.pick(TIMES)
    return f"{time} {one}", f"{two} {time}"
