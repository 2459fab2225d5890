"""Multiple-choice questions on a passage: who is going where in a dialogue, and why somebody did something.

The second asks for causes that the passage does not name: they are known from the corpus.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CAUSES
from tasks.miniature.lexicon import PEOPLE, PLACES, pronoun
from tasks.miniature.sentences import told
from tasks.miniature.world import World


def dialogue(world: World, draw: Draw, index: int) -> dict:
    """Two to four speakers say where they go; the question is about one of them, and all places are choices."""
    n = 2 + index % 3
    speakers, places = draw.some(PEOPLE, n), draw.some(PLACES, n)
    asked = draw.below(n)
    lines = [
        f"{speaker}: i am going to the {place}."
        if draw.heads()
        else f"{speaker}: you will find me at the {place}."
        for speaker, place in zip(speakers, places, strict=True)
    ]
    label = index // 3 % n
    wrong = places[:asked] + places[asked + 1 :]
    return {
        "dialogue": told(lines),
        "question": f"where is {speakers[asked]} going?",
        "choices": [f"the {place}" for place in draw.placed(places[asked], wrong, label)],
        "label": label,
    }


def motives(world: World, draw: Draw, index: int) -> dict:
    """Two people do something; the cause of what one of them did is among four choices, beside the cause of the other."""
    people = draw.some(PEOPLE, 2)
    causes = draw.some(CAUSES, 4)
    done = [f"{person} {effect}" for person, (_, effect) in zip(people, causes, strict=False)]
    label = index % 4
    return {
        "passage": told(draw.shuffled(done)),
        "question": f"why did {people[0]} do it?",
        "choices": [
            f"{pronoun(people[0])} {cause}"
            for cause in draw.placed(causes[0][0], [cause for cause, _ in causes[1:]], label)
        ],
        "label": label,
    }
