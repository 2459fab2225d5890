"""Who is meant? A pronoun that may stand for one person, and a gap that one of two people fills.

The reason decides together with the verb and the side it is told from, or the verb with what it is done to; no
word, order or name does alone.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import REASONS
from tasks.miniature.lexicon import FEMALE, MALE, PEOPLE, THINGS, USES, pronoun
from tasks.miniature.sentences import same_gender
from tasks.miniature.world import World


def pronouns(world: World, draw: Draw, index: int) -> dict:
    """Whom of two does the word mean? By gender, by the reason, and (half of the rows) by what one does with a thing."""
    label, by = index % 2, index // 2 % 4
    if by < 2:
        people = draw.shuffled([draw.pick(FEMALE), draw.pick(MALE)]) if by else same_gender(draw, 2)
        sentence, meant = reasoned(draw, people)
        word, named = pronoun(people[meant]), people
    else:
        sentence, things, meant = handled(draw)
        word, named = "it", [f"the {thing}" for thing in things]
    return {
        "text": sentence.format(x=word),
        "word": word,
        "choices": draw.placed(named[meant], [named[1 - meant]], label),
        "label": label,
    }


def gaps(world: World, draw: Draw, index: int) -> dict:
    """One of two fills the gap: two people of one gender, or two things."""
    label = index % 2
    if index // 2 % 2:
        named = same_gender(draw, 2)
        sentence, meant = reasoned(draw, named)
    else:
        sentence, things, meant = handled(draw)
        named = [f"the {thing}" for thing in things]
    begun, rest = sentence.split(" {x}")
    return {
        "sentence": sentence.format(x="_"),
        "begun": begun,
        "rest": rest,
        "choices": draw.placed(named[meant], [named[1 - meant]], label),
        "label": label,
    }


def reasoned(draw: Draw, people: list[str]) -> tuple[str, int]:
    """A sentence with `{x}` for the one of whom the reason speaks, and which of the people that is."""
    *forms, first, second = draw.pick(REASONS)
    meant = draw.below(2)
    form = draw.pick(forms).format(a=people[0], b=people[1])
    return f"{form} because {{x}} {(first, second)[meant]}.", meant


def handled(draw: Draw) -> tuple[str, list[str], int]:
    """Somebody has two things and does with one, `{x}`, what one does with it; the things, and which it is."""
    person, things = draw.pick(PEOPLE), draw.some(THINGS, 2)
    meant = draw.below(2)
    return (
        f"{person} took a {things[0]} and a {things[1]} and {USES[things[meant]]} {{x}}.",
        things,
        meant,
    )
