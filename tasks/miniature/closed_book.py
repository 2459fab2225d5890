"""Questions on the facts of the world without a passage: the answer in one word, and whether an answer is right.

The key is the fact: no fact that validation or test asks is asked in training. The corpus tells them all.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import PEOPLE
from tasks.miniature.world import RELATIONS, World


def facts(world: World, draw: Draw, index: int) -> dict:
    """A person by job and town, or by their friend, and something that is true of them."""
    person = draw.pick(PEOPLE)
    if draw.heads():
        words, relation = world.described(person), draw.pick(("food", "pet", "friend"))
    else:
        words = f"the friend of {world.facts['friend'][person]}"
        relation = draw.pick(("town", "job", "food", "pet"))
    return {
        "fact": f"{words} {relation}",
        "question": draw.pick(RELATIONS[relation].questions).format(p=words),
        "answer": world.facts[relation][person],
    }


def answers(world: World, draw: Draw, index: int) -> dict:
    """A question on a person and a sentence; does it answer the question, and truly?

    What does not is half of the time about something else, and half of the time false.
    """
    relation, other = draw.some(sorted(RELATIONS), 2)
    person, label = draw.pick(PEOPLE), index % 2
    right = world.facts[relation][person]
    question = draw.pick(RELATIONS[relation].questions).format(p=person)
    if label and draw.heads():
        relation, given = other, world.facts[other][person]
    elif label:
        given = draw.pick(sorted(set(world.facts[relation].values()) - {right, person}))
    else:
        given = right
    return {
        "fact": f"{person} {relation}",
        "question": question,
        "answer": draw.pick(RELATIONS[relation].statements).format(p=person, v=given),
        "label": label,  # 0 yes, 1 no
    }
