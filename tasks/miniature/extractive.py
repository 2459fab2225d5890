"""Questions whose answer is a span of the passage: who put what where, and whom a rule speaks of."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import FOODS, OPPOSITES, PEOPLE, PLACES, THINGS
from tasks.miniature.sentences import FILLERS, told
from tasks.miniature.world import World


def belongings(world: World, draw: Draw, index: int) -> dict:
    """One to three people put things in places; one of person, thing and place is asked for, by the others."""
    n = draw.pick((1, 1, 2, 3))
    people, things, places = (draw.some(items, n) for items in (PEOPLE, THINGS, PLACES))
    asked = draw.below(n)
    person, thing, place = people[asked], things[asked], places[asked]
    question, answer = (
        (f"where is the {thing}?", f"the {place}"),
        (f"who had the {thing}?", person),
        (f"what is in the {place}?", f"the {thing}"),
    )[index % 3]
    lines = [f"{p} put the {t} in the {q}" for p, t, q in zip(people, things, places, strict=True)]
    return {
        "passage": told([draw.pick(FILLERS), *lines] if n == 1 else lines),
        "question": question,
        "answer": answer,
    }


def rules(world: World, draw: Draw, index: int) -> dict:
    """What one food or two do to people, and what one or two people ate: who is how now?"""
    n = draw.pick((1, 2))
    foods, people = draw.some(FOODS, n), draw.some(PEOPLE, n)
    effects = draw.some(sorted(OPPOSITES), n)
    eaten = [f"{p} ate {f}" for p, f in zip(people, foods, strict=True)]
    rule = [f"{f} makes you {e}" for f, e in zip(foods, effects, strict=True)]
    asked = draw.below(n)
    question, answer = (
        (f"who is {effects[asked]} now?", people[asked]),
        (f"how is {people[asked]} now?", effects[asked]),
    )[index % 2]
    return {
        "background": told(draw.shuffled(rule)),
        "situation": told(draw.shuffled(eaten)),
        "question": question,
        "answer": answer,
    }
