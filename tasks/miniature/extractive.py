"""Questions whose answer is a span of the passage: who put what where, and whom a rule speaks of."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import FOODS, OPPOSITES, PEOPLE, PLACES, THINGS
from tasks.miniature.sentences import told
from tasks.miniature.world import World


def belongings(world: World, draw: Draw, index: int) -> dict:
    """Three people put things in places; one of person, thing and place is asked for, by the others."""
    people, things, places = (draw.some(items, 3) for items in (PEOPLE, THINGS, PLACES))
    asked = draw.below(3)
    person, thing, place = people[asked], things[asked], places[asked]
    question, answer = (
        (f"where is the {thing}?", f"the {place}"),
        (f"who had the {thing}?", person),
        (f"what is in the {place}?", f"the {thing}"),
    )[index % 3]
    return {
        "passage": told(
            [f"{p} put the {t} in the {q}" for p, t, q in zip(people, things, places, strict=True)]
        ),
        "question": question,
        "answer": answer,
    }


def rules(world: World, draw: Draw, index: int) -> dict:
    """What food does to people, and what two people ate: who became so?"""
    foods, people = draw.some(FOODS, 2), draw.some(PEOPLE, 2)
    effects = draw.some(sorted(OPPOSITES), 2)
    asked = index % 2
    eaten = [f"{p} ate {f}" for p, f in zip(people, foods, strict=True)]
    rule = [f"{f} makes you {e}" for f, e in zip(foods, effects, strict=True)]
    return {
        "background": told(draw.shuffled(rule)),
        "situation": told(draw.shuffled(eaten)),
        "question": f"who is {effects[asked]} now?",
        "answer": people[asked],
    }
