"""Does a statement follow from a passage? Three ways in three rounds of growing difficulty, and two ways.

Statements of all labels are made of the same words, all of which the passage holds.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import COMPARISONS, CONVERSES
from tasks.miniature.lexicon import KINDS, PEOPLE, PLACES, SOME, THINGS
from tasks.miniature.sentences import FILLERS, converse, told
from tasks.miniature.summaries import GATHERED
from tasks.miniature.world import World

YES, NO, MAYBE = range(3)


def statements(world: World, draw: Draw, index: int) -> dict:
    """Yes, no or maybe; a third of the rows each: places told, places after a move, a chain of comparisons."""
    label, round_ = index % 3, index // 3 % 3
    passage, statement = (told_places, moved, compared)[round_](draw, label)
    return {
        "passage": told(passage),
        "statement": f"{statement}.",
        "question": asked(statement),
        "round": f"r{round_ + 1}",
        "label": label,
    }


def asked(statement: str) -> str:
    """A statement with "is" as a question."""
    subject, rest = statement.split(" is ", 1)
    return f"is {subject} {rest}?"


def told_places(draw: Draw, label: int) -> tuple[list[str], str]:
    """Two people are somewhere; of a third no place is told."""
    a, b, c = draw.some(PEOPLE, 3)
    here, there = draw.some(PLACES, 2)
    passage = [f"{a} is at the {here}", f"{b} is at the {there}", f"{c} has a {draw.pick(THINGS)}"]
    person = c if label == MAYBE else a
    return draw.shuffled(passage), f"{person} is at the {there if label == NO else here}"


def moved(draw: Draw, label: int) -> tuple[list[str], str]:
    """Somebody goes to one place and then to another; of somebody else no place is told."""
    a, b = draw.some(PEOPLE, 2)
    here, there = draw.some(PLACES, 2)
    passage = [
        f"{a} went to the {there}",
        f"then {a} went to the {here}",
    ]
    passage.insert(draw.below(3), f"{b} has a {draw.pick(THINGS)}")
    place = draw.pick((here, there)) if label == MAYBE else (there if label == NO else here)
    return passage, f"{b if label == MAYBE else a} is at the {place}"


def compared(draw: Draw, label: int) -> tuple[list[str], str]:
    """Two comparisons that make a chain, from which the third follows, or a fork, from which it does not."""
    forms = draw.pick(COMPARISONS)
    a, b, c = draw.some(PEOPLE, 3)
    up = draw.heads()  # a fork is open above or below
    first = (a, b) if label != MAYBE or up else (b, a)
    second = (b, c) if label != MAYBE or not up else (c, b)
    passage = [draw.pick(forms).format(a=x, b=y) for x, y in (first, second)]
    x, y = (a, c) if label == YES else (c, a) if label == NO else draw.shuffled((a, c))
    return draw.shuffled(passage), draw.pick(forms).format(a=x, b=y)


def entailment(world: World, draw: Draw, index: int) -> dict:
    """Yes or no: a relation told from the other side, the place of one of two things, or the kind of what is told."""
    label = index % 2
    passage, statement = (related, placed, of_kind, of_kind)[index // 2 % 4](draw, label)
    return {"premise": told(passage), "hypothesis": f"{statement}.", "label": label}


def related(draw: Draw, label: int) -> tuple[list[str], str]:
    """What two people have to do with each other, and the same from either side, or with roles swapped."""
    a, b = draw.some(PEOPLE, 2)
    forms, thing = draw.pick(CONVERSES), draw.pick(THINGS)
    first, statement = converse(draw, a=a, b=b, thing=thing, forms=forms, same=label == YES)
    return draw.shuffled([first, f"{draw.pick((a, b))} went to the {draw.pick(PLACES)}"]), statement


def placed(draw: Draw, label: int) -> tuple[list[str], str]:
    """Two things in two places, and one of them in either."""
    a, b = draw.some(PEOPLE, 2)
    (mine, yours), (here, there) = draw.some(THINGS, 2), draw.some(PLACES, 2)
    passage = [f"{a} put the {mine} in the {here}", f"{b} put the {yours} in the {there}"]
    return draw.shuffled(passage), f"the {mine} is in the {here if label == YES else there}"


def of_kind(draw: Draw, label: int) -> tuple[list[str], str]:
    """Somebody did something with a plum, hence with some fruit; with a spade, hence not."""
    person, verb = draw.pick(PEOPLE), draw.pick(GATHERED)
    kind, other = draw.some(sorted(KINDS), 2)
    passage = [draw.pick(FILLERS), f"{person} {verb} a {draw.pick(KINDS[kind])}"]
    return passage, f"{person} {verb} {SOME[kind if label == YES else other]}"
