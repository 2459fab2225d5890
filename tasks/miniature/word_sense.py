"""Does a word mean the same in two sentences?"""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.events import SENSES
from tasks.miniature.sentences import TIMES
from tasks.miniature.world import World


def senses(world: World, draw: Draw, index: int) -> dict:
    """Two sentences that have the word and nothing else in common.

    Every sentence stands in as many pairs of either label.
    """
    label = index % 2  # 0 the same, 1 not
    word = draw.pick(sorted(SENSES))
    (_, mine), (_, other) = draw.shuffled(SENSES[word])
    one, two = draw.some(mine, 2)
    if label:
        two = draw.pick(other)
    first, second = draw.some(TIMES, 2)
    return {
        "word": word,
        "sentence1": f"{first} {one}.",
        "sentence2": f"{second} {two}.",
        "label": label,
    }
