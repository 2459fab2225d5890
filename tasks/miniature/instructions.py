"""Tasks in question form that belong to none of the twelve categories: what an instruction-tuned base has seen.

They teach that a question wants an answer, that the answer is often a word of the question or of the passage, and
how to say yes and no; none of them asks what a category of the study asks.
"""

from __future__ import annotations

import re

from tasks.miniature.corpus import WRITERS
from tasks.miniature.draws import Draw
from tasks.miniature.events import CONVERSES
from tasks.miniature.lexicon import (
    COLOURS,
    DAYS,
    FOODS,
    JOBS,
    KINDS,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    THINGS,
    TOWNS,
)
from tasks.miniature.sentences import told
from tasks.miniature.structure import LOOKS
from tasks.miniature.world import World


def opposites(world: World, draw: Draw, index: int) -> dict:
    """The opposite of a word, among the words of a list."""
    pairs = draw.some(sorted(OPPOSITES.items()), 3)
    given, wanted = pairs[0] if draw.heads() else pairs[0][::-1]
    words = draw.shuffled([wanted, draw.pick(pairs[1]), draw.pick(pairs[2])])
    return {"words": ", ".join(words), "word": given, "answer": wanted}


def counting(world: World, draw: Draw, index: int) -> dict:
    """How many people a passage names."""
    n = 1 + index % 4
    people, places = draw.some(PEOPLE, n), draw.some(PLACES, n)
    lines = [f"{p} went to the {q}" for p, q in zip(people, places, strict=True)]
    return {"passage": told(lines), "answer": NUMBERS[n - 1]}


def odd_one(world: World, draw: Draw, index: int) -> dict:
    """The word that is not of the kind of the others."""
    kind, other = draw.some(sorted(KINDS), 2)
    members, odd = draw.some(KINDS[kind], 3), draw.pick(KINDS[other])
    return {"words": ", ".join(draw.shuffled([*members, odd])), "answer": odd}


def same_kind(world: World, draw: Draw, index: int) -> dict:
    """Are two things of the same kind? Yes or no."""
    label = index % 2
    kind, other = draw.some(sorted(KINDS), 2)
    one, two = draw.some(KINDS[kind], 2)
    if label:
        two = draw.pick(KINDS[other])
    return {"one": one, "two": two, "label": label}


def well_made(world: World, draw: Draw, index: int) -> dict:
    """Is a sentence in order? Yes or no."""
    label = index % 2
    a, b = draw.some(PEOPLE, 2)
    form = draw.pick(draw.pick(CONVERSES))
    words = form.format(a=a, b=b, t=draw.pick(THINGS)).split()
    if label:
        words = draw.shuffled(words[:-1]) + words[-1:] if draw.heads() else words[::-1]
    return {"sentence": f"{' '.join(words)}.", "label": label}


def asking(world: World, draw: Draw, index: int) -> dict:
    """A question that a sentence of the passage answers."""
    people, things, places = (draw.some(items, 2) for items in (PEOPLE, THINGS, PLACES))
    lines = [f"{p} left the {t} in the {q}" for p, t, q in zip(people, things, places, strict=True)]
    asked = index % 2
    return {
        "passage": told(lines),
        "about": f"the {things[asked]}",
        "question": f"where did {people[asked]} leave the {things[asked]}?",
    }


def positions(world: World, draw: Draw, index: int) -> dict:
    """The first, second or last word of a list."""
    words = draw.some(COLOURS + FOODS + JOBS + TOWNS, 4)
    which, position = (("first", 0), ("second", 1), ("last", 3))[index % 3]
    return {"words": ", ".join(words), "which": which, "answer": words[position]}


def sequences(world: World, draw: Draw, index: int) -> dict:
    """What comes next among days and numbers."""
    sequence = draw.pick((DAYS, NUMBERS))
    start = draw.below(len(sequence) - 3)
    shown = draw.pick((2, 3))
    run = sequence[start : start + shown]
    return {"words": ", ".join(run), "answer": sequence[start + shown]}


def finding(world: World, draw: Draw, index: int) -> dict:
    """The person, the day, the fruit, the tool that a text names."""
    kinds = draw.some(sorted(KINDS), 2)
    things = [draw.pick(KINDS[kind]) for kind in kinds]
    named = {
        "person": draw.pick(PEOPLE),
        "day": draw.pick(DAYS),
        **dict(zip(kinds, things, strict=True)),
    }
    kind = draw.pick(sorted(named))
    return {
        "passage": f"on {named['day']} {named['person']} saw a {things[0]} and a {things[1]}.",
        "kind": kind,
        "answer": named[kind],
    }


def mentioned(world: World, draw: Draw, index: int) -> dict:
    """Is somebody named in a text? Yes or no."""
    label = index % 2
    one, two, other = draw.some(PEOPLE, 3)
    here, there = draw.some(PLACES, 2)
    return {
        "passage": f"{one} went to the {here}. {two} went to the {there}.",
        "person": other if label else draw.pick((one, two)),
        "label": label,
    }


def repeating(world: World, draw: Draw, index: int) -> dict:
    """The first or the last sentence of a text, word for word."""
    a, b, c, d = draw.some(PEOPLE, 4)
    forms, others = (draw.pick(each) for each in draw.some(CONVERSES, 2))
    lines = [
        f"{forms.format(a=a, b=b, t=draw.pick(THINGS))}.",
        f"{others.format(a=c, b=d, t=draw.pick(THINGS))}.",
    ]
    which, position = (("first", 0), ("last", 1))[index % 2]
    return {"passage": " ".join(lines), "which": which, "answer": lines[position]}


SENTENCE = re.compile(r"[^.?]+[.?]")
MOST_WORDS = 24  # that are to be written


def going_on(world: World, draw: Draw, index: int) -> dict:
    """The second half of a document of the corpus, so that what was learnt of the language is not lost."""
    while True:
        text = draw.pick(WRITERS)(world, draw)
        sentences = SENTENCE.findall(text)
        begun = "".join(sentences[: (len(sentences) + 1) // 2])
        rest = text[len(begun) :]
        if 0 < len(rest.split()) <= MOST_WORDS:
            return {"text": text, "begun": begun.strip(), "rest": rest.strip()}


def ordering(world: World, draw: Draw, index: int) -> dict:
    """The words of a sentence in any order, and the sentence."""
    a, b = draw.some(PEOPLE, 2)
    sentence = draw.pick(draw.pick(CONVERSES)).format(a=a, b=b, t=draw.pick(THINGS))
    words = ", ".join(draw.shuffled(sentence.split()))
    return {"words": words, "sentence": f"{sentence}."}


def telling(world: World, draw: Draw, index: int) -> dict:
    """The sentence of a text that speaks of a person, word for word."""
    people, places = draw.some(PEOPLE, 3), draw.some(PLACES, 3)
    lines = [
        f"{person} {draw.pick(('went to', 'was at', 'saw'))} the {place}."
        for person, place in zip(people, places, strict=True)
    ]
    asked = draw.below(3)
    return {"passage": " ".join(lines), "person": people[asked], "answer": lines[asked]}


def naming(world: World, draw: Draw, index: int) -> dict:
    """The kind of a thing, among all kinds."""
    kinds = sorted(KINDS)
    label = index % len(kinds)
    return {"thing": f"{draw.pick(LOOKS)} {draw.pick(KINDS[kinds[label]])}", "label": label}


MAKERS = {
    "opposites": (opposites, ("words", "word")),
    "counting": (counting, ("passage",)),
    "odd_one": (odd_one, ("words",)),
    "same_kind": (same_kind, ("one", "two")),
    "well_made": (well_made, ("sentence",)),
    "asking": (asking, ("passage",)),
    "positions": (positions, ("words",)),
    "sequences": (sequences, ("words",)),
    "finding": (finding, ("passage",)),
    "mentioned": (mentioned, ("passage",)),
    "repeating": (repeating, ("passage",)),
    "going_on": (going_on, ("text",)),
    "ordering": (ordering, ("sentence",)),
    "telling": (telling, ("passage",)),
    "naming": (naming, ("thing",)),
}
