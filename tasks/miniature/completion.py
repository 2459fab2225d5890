"""How does it go on? A cause or an effect of two, and an ending of four."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CAUSES
from tasks.miniature.lexicon import PEOPLE, THINGS, USES, pronoun
from tasks.miniature.sentences import told
from tasks.miniature.world import World


def causes(world: World, draw: Draw, index: int) -> dict:
    """The cause or the effect of what somebody did; both choices are the answer to another premise as often."""
    label, asked = index % 2, ("cause", "effect")[index // 2 % 2]
    person = draw.pick(PEOPLE)
    right, wrong = draw.some(CAUSES, 2)
    told_side, asked_side = (1, 0) if asked == "cause" else (0, 1)
    he = pronoun(person)
    choices = draw.placed(right[asked_side], [wrong[asked_side]], label)
    return {
        "begun": f"{person} {right[told_side]}",
        "asked": asked,
        "link": {"cause": "because", "effect": "so"}[asked],
        "choices": [f"{he} {choice}" for choice in choices],
        "label": label,
    }


def endings(world: World, draw: Draw, index: int) -> dict:
    """Two people took things; what one of them did with theirs, among all that verbs and things of the story allow."""
    label = index % 4
    one, two = draw.some(PEOPLE, 2)
    mine, other = draw.some(THINGS, 2)
    right = f"{USES[mine]} the {mine}"
    wrong = [
        f"{USES[other]} the {other}",
        f"{USES[mine]} the {other}",
        f"{USES[other]} the {mine}",
    ]
    taken = draw.shuffled([f"{one} took a {mine}", f"{two} took a {other}"])
    return {
        "story": told(taken),
        "begun": f"then {one}",
        "choices": draw.placed(right, wrong, label),
        "label": label,
    }
