"""Multiple-choice questions on a passage: who is going where in a dialogue, and why somebody did something.

The second asks for causes that the passage does not name: they are known from the corpus.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CAUSES
from tasks.miniature.lexicon import PEOPLE, PLACES, pronoun
from tasks.miniature.sentences import told
from tasks.miniature.world import World

GOING = ("i am going to the {}", "you will find me at the {}")


def dialogue(world: World, draw: Draw, index: int) -> dict:
    """One to three people say where they go; choices are two to four places, half of the wrong ones from the talk.

    So half of what there is to know is which places are named, and the other half who named them.
    """
    spoken, n = 1 + draw.below(3), 2 + index % 3
    speakers, places = draw.some(PEOPLE, spoken), draw.some(PLACES, 6)
    lines = [
        f"{speaker}: {draw.pick(GOING).format(place)}."
        for speaker, place in zip(speakers, places, strict=False)
    ]
    asked = draw.below(spoken)
    label = index // 3 % n
    named = places[:asked] + places[asked + 1 : spoken]
    wrong = [*(named if draw.heads() else []), *places[3:]][: n - 1]
    return {
        "dialogue": told(lines),
        "question": f"where is {speakers[asked]} going?",
        "choices": [f"the {place}" for place in draw.placed(places[asked], wrong, label)],
        "label": label,
    }


def motives(world: World, draw: Draw, index: int) -> dict:
    """Two people do something.

    The cause of what one of them did is among four choices, beside the cause of the other.
    """
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
