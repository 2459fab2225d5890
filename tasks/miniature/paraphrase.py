"""Do two sentences, or two questions, say the same?"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CONVERSES
from tasks.miniature.lexicon import PEOPLE, THINGS
from tasks.miniature.sentences import TIMES
from tasks.miniature.world import RELATIONS, World


def sentences(world: World, draw: Draw, index: int) -> dict:
    """What two people have to do with each other, told from either side.

    Where the two sentences differ, it is in what is told, in a person, or in who does what to whom.
    """
    label = index % 2
    a, b, c = draw.some(PEOPLE, 3)
    thing = draw.pick(THINGS)
    forms, others = draw.some(CONVERSES, 2)
    differs = "nothing" if label else draw.pick(("relation", "relation", "person", "roles"))
    one, two = converse(draw, a=a, b=b, thing=thing, forms=forms, same=differs != "roles")
    if differs == "relation":
        _, two = converse(draw, a=a, b=b, thing=thing, forms=others, same=True)
    elif differs == "person":
        two = " ".join(c if word == b else word for word in two.split())
    return {"sentence1": one, "sentence2": two, "label": label}  # 1 the same, 0 not


def questions(world: World, draw: Draw, index: int) -> dict:
    """Two questions on facts of people: the same fact in other words, another person, or another fact."""
    label = index % 2
    relation, other = draw.some(sorted(RELATIONS), 2)
    person, somebody = draw.some(PEOPLE, 2)
    first, second = draw.shuffled(RELATIONS[relation].questions)
    if label == 0 and draw.heads():
        second = draw.pick(RELATIONS[other].questions)
        somebody = person
    return {
        "question1": first.format(p=person),
        "question2": second.format(p=person if label else somebody),
        "label": label,  # 1 the same, 0 not
    }


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
