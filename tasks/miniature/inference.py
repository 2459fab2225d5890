"""What follows? One statement of three, in three rounds of growing difficulty, and one of two.

What follows is known from the corpus: a plum is some fruit, and who lit a fire was cold. What is told and what is stated share no word
but names, and every statement is right as often as wrong, so that only the two together tell.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CAUSES
from tasks.miniature.lexicon import KINDS, PEOPLE, PLACES, SOME
from tasks.miniature.sentences import FILLERS, told
from tasks.miniature.summaries import GATHERED
from tasks.miniature.world import World


def statements(world: World, draw: Draw, index: int) -> dict:
    """Of three; a third of the rows each: from one sentence, from one beside another, of one of two people."""
    label, round_ = index % 3, index // 3 % 3
    person, somebody = draw.some(PEOPLE, 2)
    if round_ < 2:
        premise, right, *wrong = (gathered, moved)[index // 9 % 2](draw, person, of=3)
        passage = [premise, f"{person} went to the {draw.pick(PLACES)}"][: round_ + 1]
    else:
        (state, action), (other_state, other_action), (neither, _) = draw.some(CAUSES, 3)
        passage = [f"{person} {action}", f"{somebody} {other_action}"]
        right, *wrong = (f"{person} {each}" for each in (state, other_state, neither))
    return {
        "passage": told(draw.shuffled(passage)),
        "round": f"r{round_ + 1}",
        "choices": [f"{each}." for each in draw.placed(right, wrong, label)],
        "label": label,
    }


def entailment(world: World, draw: Draw, index: int) -> dict:
    """Of two: kinds, or states."""
    label = index % 2
    premise, right, *wrong = (gathered, moved)[index // 2 % 2](draw, draw.pick(PEOPLE), of=2)
    return {
        "premise": told([draw.pick(FILLERS), premise]),
        "choices": [f"{each}." for each in draw.placed(right, wrong, label)],
        "label": label,
    }


def gathered(draw: Draw, person: str, *, of: int) -> list[str]:
    """Somebody did something with a plum; hence there was some fruit, and not, as the others of so many say, some tools."""
    kinds = draw.some(sorted(KINDS), of)
    premise = f"{person} {draw.pick(GATHERED)} a {draw.pick(KINDS[kinds[0]])}"
    return [premise, *(f"there was {SOME[kind]}" for kind in kinds)]


def moved(draw: Draw, person: str, *, of: int) -> list[str]:
    """Somebody lit a fire; hence they were cold, and not, as the others of so many say, thirsty."""
    causes = draw.some(CAUSES, of)
    return [f"{person} {causes[0][1]}", *(f"{person} {state}" for state, _ in causes)]
