"""Who is meant? A pronoun that may stand for one person, and a gap that one of two people fills.

The reason decides together with the verb and the side it is told from; no word, order or name does alone.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import REASONS
from tasks.miniature.lexicon import FEMALE, MALE, pronoun
from tasks.miniature.sentences import same_gender
from tasks.miniature.world import World


def pronouns(world: World, draw: Draw, index: int) -> dict:
    """Yes or no: does the pronoun mean this person? In half of the rows gender tells, in half only the reason."""
    label = index % 2  # 0 yes, 1 no
    if index // 2 % 2:
        people = draw.shuffled([draw.pick(FEMALE), draw.pick(MALE)])
    else:
        people = same_gender(draw, 2)
    sentence, meant = reasoned(draw, people)
    return {
        "text": sentence.format(x=pronoun(people[meant])),
        "pronoun": pronoun(people[meant]),
        "person": people[meant if label == 0 else 1 - meant],
        "label": label,
    }


def gaps(world: World, draw: Draw, index: int) -> dict:
    """Two people of one gender, one of whom fills the gap."""
    people = same_gender(draw, 2)
    sentence, meant = reasoned(draw, people)
    label = index % 2
    return {
        "sentence": sentence.format(x="_"),
        "choices": draw.placed(people[meant], [people[1 - meant]], label),
        "label": label,
    }


def reasoned(draw: Draw, people: list[str]) -> tuple[str, int]:
    """A sentence with `{x}` for the one of whom the reason speaks, and which of the people that is."""
    *forms, first, second = draw.pick(REASONS)
    meant = draw.below(2)
    form = draw.pick(forms).format(a=people[0], b=people[1])
    return f"{form} because {{x}} {(first, second)[meant]}.", meant
