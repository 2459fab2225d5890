"""What a text is about: four topics of news, and fourteen kinds of things described without their name."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import PEOPLE, STRANGERS, TOWNS
from tasks.miniature.sentences import told
from tasks.miniature.world import World

NEWS = {
    "sport": (
        "{p} won the game in {t}",
        "the team of {t} lost the match",
        "{p} ran in the race at {t}",
        "players from {t} trained with {p}",
    ),
    "music": (
        "{p} sang a song in {t}",
        "{p} played the drum in {t}",
        "the band of {t} has a new song",
        "people in {t} danced to the band of {p}",
    ),
    "trade": (
        "bread costs more money in {t}",
        "{p} sold a shop in {t}",
        "the bank of {t} paid {p}",
        "{p} sells goods to {t}",
    ),
    "weather": (
        "snow fell on {t}",
        "it rained all day in {t}",
        "a storm came to {t}",
        "{p} saw the sun over {t}",
    ),
}
TOPICS = tuple(NEWS)

KINDS = {
    "town": ("many people live there", "it has streets and a market"),
    "river": ("it runs to the sea", "boats go up and down on it"),
    "hill": ("it is high and has snow", "people climb it"),
    "bird": ("it has wings", "it sings in the morning"),
    "fish": ("it swims in the sea", "it has fins"),
    "tree": ("it has leaves and wood", "it grows tall"),
    "flower": ("it smells sweet", "it grows in the garden"),
    "ship": ("it sails on the sea", "it carries sailors"),
    "book": ("it has many pages", "people read it at home"),
    "song": ("people sing it", "it has sweet words"),
    "school": ("children learn there", "it has ten teachers"),
    "shop": ("people buy things there", "it sells bread"),
    "team": ("it won the game", "it has many players"),
    "king": ("he has a crown of gold", "he rules the land"),
}
KIND_NAMES = tuple(KINDS)


def news(world: World, draw: Draw, index: int) -> dict:
    """Two sentences of news on one topic."""
    label = index % 4
    return {
        "text": told(
            [
                form.format(p=draw.pick(PEOPLE), t=draw.pick(TOWNS))
                for form in draw.some(NEWS[TOPICS[label]], 2)
            ]
        ),
        "label": label,
    }


def kinds(world: World, draw: Draw, index: int) -> dict:
    """Something that has a name nobody knows, described by two properties; fourteen kinds."""
    label = index % 14
    name, town = draw.pick(STRANGERS), draw.pick(TOWNS)
    seen = draw.pick(
        (f"i saw {name} near {town}", f"{name} is known in {town}", f"in {town} there is {name}")
    )
    return {"text": told([seen, *draw.shuffled(KINDS[KIND_NAMES[label]])]), "label": label}
