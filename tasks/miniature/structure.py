"""Words and tables to be put into a sentence."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import DOINGS, FOODS, JOBS, PETS, PLACES, STRANGERS, TOWNS
from tasks.miniature.world import World

LOOKS = ("big", "small", "poor", "young", "white", "black", "glad", "sad")


def concepts(world: World, draw: Draw, index: int) -> dict:
    """Four words in any order and the sentence they make."""
    look, doing, place = draw.pick(LOOKS), draw.pick(sorted(DOINGS)), draw.pick(PLACES)
    actor = draw.pick(PETS + JOBS)
    return {
        "concepts": ", ".join(draw.shuffled([look, actor, doing, place])),
        "target": f"the {look} {actor} {DOINGS[doing]} in the {place}.",
    }


def lives(world: World, draw: Draw, index: int) -> dict:
    """A table of a person, with or without a pet and a food, and a sentence that says it all."""
    name, job, town = draw.pick(STRANGERS), draw.pick(JOBS), draw.pick(TOWNS)
    fields, target = [f"job: {job}", f"town: {town}"], f"{name} is a {job} from {town}"
    if index % 3 != 1:
        food = draw.pick(FOODS)
        fields.append(f"food: {food}")
        target += f" who likes {food}"
    if index % 3 != 2:
        pet = draw.pick(PETS)
        fields.append(f"pet: {pet}")
        target += f" and has a {pet}" if index % 3 == 0 else f" who has a {pet}"
    return {
        "table": "; ".join([f"name: {name}", *draw.shuffled(fields)]),
        "target": f"{target}.",
    }
