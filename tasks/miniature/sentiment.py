"""Reviews: of a thing, with one to five stars, and of a play, good or bad with negations."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import THINGS, TOWNS
from tasks.miniature.sentences import told
from tasks.miniature.world import World

# Sentences that one star, two,... five stars go with; "it" is the thing.
STARS = (
    ("it is very bad", "i hate it", "it broke at once"),
    ("it is bad", "i do not like it", "it broke soon"),
    ("it is fair", "it will do", "it works on some days"),
    ("it is good", "i like it", "it works well"),
    ("it is very good", "i love it", "it works best of all"),
)
GOOD = ("great", "fine", "lovely", "good")
BAD = ("dull", "poor", "awful", "bad")
PARTS = ("play", "story", "song", "dance", "end")


def products(world: World, draw: Draw, index: int) -> dict:
    """A review of a thing in two sentences of one mind, with a neutral one around."""
    label = index % 5
    thing, town = draw.pick(THINGS), draw.pick(TOWNS)
    neutral = draw.pick((f"i bought the {thing} in {town}", f"the {thing} came from {town}"))
    return {
        "review": told([neutral, *draw.some(STARS[label], 2)]),
        "label": label,  # stars - 1
    }


def plays(world: World, draw: Draw, index: int) -> dict:
    """A review of a play; each of its two sentences says the same, straight or by negation."""
    label = index % 2
    parts = draw.some(PARTS, 2)
    return {
        "review": told([verdict(draw, part, good=label == 1) for part in parts]),
        "label": label,  # 0 bad, 1 good
    }


def verdict(draw: Draw, subject: str, *, good: bool) -> str:
    """ "the song was not dull": the subject praised or blamed."""
    straight = draw.heads()
    adjective = draw.pick(GOOD if good == straight else BAD)
    return f"the {subject} was {adjective if straight else f'not {adjective}'}"
