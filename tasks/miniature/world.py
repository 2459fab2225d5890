"""The facts that hold as long as the world does.

Where each person lives, works, eats, what they have, who their friend is.

They are drawn from the seed. The corpus tells all of them; closed-book questions ask for them, and no passage
contradicts them.
"""

from __future__ import annotations

import dataclasses
import functools

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import FOODS, JOBS, PEOPLE, PETS, TOWNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact, as it is told and asked; `{p}` is the person, or words for one, `{v}` the value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = {
    "town": Relation(
        statements=("{p} lives in {v}.", "the home of {p} is in {v}."),
        questions=("where does {p} live?", "in which town is the home of {p}?"),
    ),
    "job": Relation(
        statements=("{p} works as a {v}.", "the job of {p} is {v}."),
        questions=("what does {p} work as?", "what is the job of {p}?"),
    ),
    "food": Relation(
        statements=("{p} likes to eat {v}.", "the food of {p} is {v}."),
        questions=("what does {p} like to eat?", "what is the food of {p}?"),
    ),
    "pet": Relation(
        statements=("{p} has a {v}.", "the pet of {p} is a {v}."),
        questions=("which animal does {p} have?", "what is the pet of {p}?"),
    ),
    "friend": Relation(
        statements=("{p} is a friend of {v}.", "the friend of {p} is {v}."),
        questions=("who is the friend of {p}?", "which person does {p} have as a friend?"),
    ),
}


@dataclasses.dataclass(frozen=True)
class World:
    """The facts of one seed.

    Attributes:
      seed: what they were drawn from, and what every text about the world is drawn from.
      facts: relation -> person -> value. No two people have both the town and the job of another; friends are mutual.
    """

    seed: int
    facts: dict[str, dict[str, str]]

    def described(self, person: str) -> str:
        """Words that name one person only: "the baker of dover"."""
        return f"the {self.facts['job'][person]} of {self.facts['town'][person]}"


@functools.cache
def world(seed: int) -> World:
    """The world of a seed."""
    draw = Draw("world", seed)
    homes = draw.some([(town, job) for town in TOWNS for job in JOBS], len(PEOPLE))
    people = draw.shuffled(PEOPLE)
    pairs = list(zip(people[::2], people[1::2], strict=True))
    facts = {
        "town": {person: town for person, (town, _) in zip(PEOPLE, homes, strict=True)},
        "job": {person: job for person, (_, job) in zip(PEOPLE, homes, strict=True)},
        "food": {person: draw.pick(FOODS) for person in PEOPLE},
        "pet": {person: draw.pick(PETS) for person in PEOPLE},
        "friend": {a: b for pair in pairs for a, b in (pair, pair[::-1])},
    }
    return World(seed, facts)
