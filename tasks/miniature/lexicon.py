"""The things there are in the world, by their names, and the closed vocabulary.

Every noun begins with a consonant, so that "a" is always right, and a word has one meaning, except
`events.SENSES`. Text is lower-case, with a space between words and none before a mark, so that decoding gives back
what was encoded.
"""

from __future__ import annotations

FEMALE = tuple("anna mia lily rosa nora ruth clara jane vera gwen emma ella".split())
MALE = tuple("tom ben max sam leo paul finn hugo karl ned jack otto".split())
PEOPLE = FEMALE + MALE  # whose facts the corpus tells
STRANGERS = tuple("zoe kit rex uma ivo lena pia bob".split())  # of whom it tells nothing

TOWNS = tuple("dover selby marlow linden thorne kelso barrow wells".split())
JOBS = tuple("baker farmer teacher doctor painter sailor driver singer".split())
PLACES = tuple(
    "mill barn market school park harbour library garden kitchen station church bridge".split()
)
FOODS = tuple("bread cheese soup cake rice honey meat butter".split())
PETS = tuple("dog cat horse goat hen duck mouse frog".split())
COLOURS = tuple("red blue green white black yellow".split())

# What one does with a thing, in the past tense.
USES = {
    "book": "read",
    "bell": "rang",
    "drum": "played",
    "ball": "kicked",
    "hat": "wore",
    "cup": "filled",
    "key": "turned",
    "rope": "pulled",
    "lamp": "lit",
    "box": "opened",
    "cart": "pushed",
    "bag": "carried",
}
THINGS = tuple(USES)

# A kind and its members. What one has some of is named by `SOME`.
KINDS = {
    "fruit": tuple("plum pear cherry lemon peach fig".split()),
    "creature": ("dog", "cat", "horse", "goat", "hen", "duck"),
    "tool": tuple("hammer knife spade rake needle brush".split()),
    "toy": ("ball", "drum", "doll", "kite", "top", "puppet"),
    "garment": tuple("shirt scarf coat sock hat glove".split()),
}
SOME = {
    "fruit": "some fruit",
    "creature": "some creatures",
    "tool": "some tools",
    "toy": "some toys",
    "garment": "some clothes",
}

NUMBERS = tuple("one two three four five six seven eight nine ten".split())
DAYS = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
OPPOSITES = {
    "big": "small",
    "good": "bad",
    "hot": "cold",
    "old": "young",
    "fast": "slow",
    "rich": "poor",
    "tall": "short",
    "strong": "weak",
    "clean": "dirty",
    "glad": "sad",
    "full": "empty",
    "early": "late",
}
# The past of what animals and people do.
DOINGS = {
    "run": "ran",
    "walk": "walked",
    "sleep": "slept",
    "sing": "sang",
    "sit": "sat",
    "hide": "hid",
    "play": "played",
    "wait": "waited",
    "dance": "danced",
    "eat": "ate",
}


def pronoun(person: str) -> str:
    """She or he."""
    return "she" if person in FEMALE else "he"
