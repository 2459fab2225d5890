"""Which of its two meanings has a word in a text?"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import SENSES
from tasks.miniature.sentences import TIMES, told
from tasks.miniature.world import World


def senses(world: World, draw: Draw, index: int) -> dict:
    """Two sentences in which the word has one meaning, which is one of its two.

    No word of the texts or choices tells by itself: see events.SENSES.
    """
    label = index % 2
    word = draw.pick(sorted(SENSES))
    (right, places), (wrong, _) = draw.shuffled(SENSES[word])
    times = draw.some(TIMES, 2)
    lines = [f"{time} {place}" for time, place in zip(times, draw.some(places, 2), strict=True)]
    return {
        "word": word,
        "text": told(lines),
        "choices": draw.placed(right, [wrong], label),
        "label": label,
    }
