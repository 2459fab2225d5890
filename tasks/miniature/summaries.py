"""Stories cut short: to what happened, without what stood around it, and to one sentence with a more general word."""

from __future__ import annotations

from tasks.miniature.draws import Draw
from tasks.miniature.lexicon import KINDS, PEOPLE, PLACES, SOME, THINGS, pronoun
from tasks.miniature.sentences import FILLERS, told
from tasks.miniature.world import World

# What one does with several members of a kind.
GATHERED = ("bought", "saw", "found", "drew", "lost")


def highlights(world: World, draw: Draw, index: int) -> dict:
    """Somebody meets somebody and gets something, among sentences that do not matter.

    Names for pronouns in the summary.
    """
    one, two = draw.some(PEOPLE, 2)
    place, thing = draw.pick(PLACES), draw.pick(THINGS)
    before, after = draw.some(FILLERS, 2)
    return {
        "story": told(
            [
                before,
                f"{one} went to the {place}",
                f"there {pronoun(one)} met {two}",
                *([after] if draw.heads() else []),
                f"{two} gave {one} a {thing}",
            ]
        ),
        "summary": told([f"{one} met {two} at the {place}", f"{one} got a {thing}"]),
    }


def gist(world: World, draw: Draw, index: int) -> dict:
    """Three things of a kind, said in one sentence that names the kind."""
    person, place, verb = draw.pick(PEOPLE), draw.pick(PLACES), draw.pick(GATHERED)
    kind = draw.pick(sorted(KINDS))
    members = draw.some(KINDS[kind], 3)
    return {
        "story": told(
            [
                f"{person} went to the {place}",
                f"{pronoun(person)} {verb} a {members[0]}",
                f"{pronoun(person)} {verb} a {members[1]} and a {members[2]}",
            ]
        ),
        "summary": f"{person} {verb} {SOME[kind]} at the {place}.",
    }
