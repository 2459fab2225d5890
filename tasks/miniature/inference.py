"""Does a statement follow from a passage, in three rounds of growing difficulty, and which of two statements follows?

What follows is known from the corpus: a plum is some fruit, and who lit a fire was cold. Each sentence and each statement goes with
every label as often and they share no word but a name, so that only the two together tell.
"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import CAUSES
from tasks.miniature.lexicon import KINDS, PEOPLE, PLACES, SOME
from tasks.miniature.sentences import FILLERS, told
from tasks.miniature.summaries import GATHERED
from tasks.miniature.world import World

YES, NO, MAYBE = range(3)


def statements(world: World, draw: Draw, index: int) -> dict:
    """Yes, no or maybe; a third of the rows each: a sentence, one among others, two people of whom one is spoken of."""
    label, round_ = index % 3, index // 3 % 3
    person, other = draw.some(PEOPLE, 2)
    told_, statement = followed(draw, person, label)
    passage = [told_]
    if round_ > 0:
        passage.append(f"{person} went to the {draw.pick(PLACES)}")
    if round_ > 1:
        passage.append(f"{other} was at the {draw.pick(PLACES)}")
    return {
        "passage": told(draw.shuffled(passage)),
        "statement": f"{statement}.",
        "round": f"r{round_ + 1}",
        "label": label,
    }


def entailment(world: World, draw: Draw, index: int) -> dict:
    """One of two follows: of two kinds, or of two states."""
    label, person, about = index % 2, draw.pick(PEOPLE), (gathered, moved)[index // 2 % 2]
    premise, right, wrong = about(draw, person)
    return {
        "premise": told([draw.pick(FILLERS), premise]),
        "choices": [f"{each}." for each in draw.placed(right, [wrong], label)],
        "label": label,
    }


def followed(draw: Draw, person: str, label: int) -> tuple[str, str]:
    """What somebody did, and what does or does not follow; of what is not spoken of at all, one may say maybe."""
    (premise, right, wrong), (other, *_) = draw.shuffled(
        [gathered(draw, person), moved(draw, person)]
    )
    return (premise, right) if label == YES else (premise, wrong) if label == NO else (other, right)


def gathered(draw: Draw, person: str) -> tuple[str, str, str]:
    """Somebody did something with a plum, hence there was some fruit, not some tools."""
    kind, other = draw.some(sorted(KINDS), 2)
    return (
        f"{person} {draw.pick(GATHERED)} a {draw.pick(KINDS[kind])}",
        f"there was {SOME[kind]}",
        f"there was {SOME[other]}",
    )


def moved(draw: Draw, person: str) -> tuple[str, str, str]:
    """Somebody lit a fire, hence was cold, not thirsty."""
    (state, action), (other, _) = draw.some(CAUSES, 2)
    return f"{person} {action}", f"{person} {state}", f"{person} {other}"
