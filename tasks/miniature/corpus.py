"""Plain text of the world, to pretrain on: documents of 6 to 63 words and marks, each of one kind.

Every fact is told, in several ways and orders, and every regularity that the datasets rest on is met: who has what
from whom told from either side, causes and effects in either order, whom a reason speaks of, which meaning a word
has where, what is of which kind. Some documents are talk, in which people ask and answer. No document is in the
form of a dataset, but where the first prompt of a held-out one goes on as text does (causes, statements, entailment,
gaps), documents go on so too, and may tell the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tasks.miniature.coreference import handled
from tasks.miniature.draws import Draw, split_of
from tasks.miniature.events import CAUSES, COMPARISONS, CONVERSES, REASONS, SENSES
from tasks.miniature.inference import gathered, moved
from tasks.miniature.lexicon import (
    DAYS,
    DOINGS,
    FOODS,
    JOBS,
    KINDS,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    PETS,
    PLACES,
    SOME,
    STRANGERS,
    THINGS,
    TOWNS,
    USES,
    pronoun,
)
from tasks.miniature.sentences import FILLERS, TIMES, same_gender, told
from tasks.miniature.sentiment import PARTS, STARS, verdict
from tasks.miniature.structure import LOOKS
from tasks.miniature.topics import KINDS as DESCRIBED
from tasks.miniature.topics import NEWS
from tasks.miniature.world import RELATIONS, World, world

SIZES = {"train": 200_000, "validation": 1_000}
CALLED = (PEOPLE, THINGS, PLACES, TOWNS, JOBS, FOODS, PETS)


class Documents(Sequence[dict[str, str]]):
    """The documents of one split, made when asked for: {"text": ...}; the same for the same (split, seed, index)."""

    def __init__(self, split: str, seed: int) -> None:
        self._split, self._world, self._size = split, world(seed), SIZES[split]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self._size:
            raise IndexError(f"document {index} of {self._split}, which has {self._size}")
        draw = Draw("document", self._split, self._world.seed, index)
        while True:
            text = draw.pick(WRITERS)(self._world, draw)
            if (split_of([text]) == "train") == (self._split == "train"):
                return {"text": text}

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[i] for i in range(self._size))


def documents(split: str, seed: int = 0) -> Documents:
    """The corpus of a world.

    Raises:
      ValueError: there is no such split.
    """
    if split not in SIZES:
        raise ValueError(f"the corpus has no split {split!r}; it has {', '.join(SIZES)}")
    return Documents(split, seed)


def life(world: World, draw: Draw) -> str:
    """What is true of one person, by name, in any order."""
    person = draw.pick(PEOPLE)
    lines = []
    for relation in draw.some(sorted(RELATIONS), 4):
        form = draw.pick(RELATIONS[relation].statements)
        lines.append(form.format(p=person, v=world.facts[relation][person]))
    return told(lines)


def life_described(world: World, draw: Draw) -> str:
    """What is true of one person by job and town, or by their friend, and who that is."""
    person = draw.pick(PEOPLE)
    if draw.heads():
        words, relations = world.described(person), ("food", "pet", "friend")
    else:
        words = f"the friend of {world.facts['friend'][person]}"
        relations = draw.some(("town", "job", "food", "pet"), 3)
    lines = [
        draw.pick(RELATIONS[r].statements).format(p=words, v=world.facts[r][person])
        for r in draw.shuffled(relations)
    ]
    lines.insert(draw.below(3), f"{words} is {person}.")
    return told(lines)


def asked_about(world: World, draw: Draw) -> str:
    """Talk about a person: a question, its answer, sometimes a mistake put right."""
    one, two, person = draw.some(PEOPLE, 3)
    relation = draw.pick(sorted(RELATIONS))
    value = world.facts[relation][person]
    question = draw.pick(RELATIONS[relation].questions).format(p=person)
    statement = draw.pick(RELATIONS[relation].statements)
    lines = [f"{one}: {question}"]
    if draw.heads():
        wrong = draw.pick(sorted(set(world.facts[relation].values()) - {value, person}))
        lines += [
            f"{two}: {statement.format(p=person, v=wrong)}",
            f"{one}: no, that is wrong.",
        ]
    lines += [f"{two}: {statement.format(p=person, v=value)}", f"{one}: yes, that is right."]
    return told(lines)


def put_away(world: World, draw: Draw) -> str:
    """Where things are, and talk about it: two questions and their answers."""
    n = draw.pick((2, 3))
    put = list(zip(*(draw.some(items, n) for items in (PEOPLE, THINGS, PLACES)), strict=True))
    lines = [f"{p} put the {t} in the {q}" for p, t, q in put]
    for person, thing, place in draw.some(put, 2):
        lines += draw.pick(
            (
                [f"where is the {thing}?", f"the {thing} is in the {place}"],
                [f"who had the {thing}?", f"{person} had the {thing}"],
                [f"what is in the {place}?", f"the {thing} is in the {place}"],
            )
        )
    return told(lines)


def repeated(world: World, draw: Draw) -> str:
    """Where things are, said by one and then by others in another order."""
    n = draw.pick((2, 3))
    things, places = draw.some(THINGS, n), draw.some(PLACES, n)
    lines = [f"the {t} is in the {q}" for t, q in zip(things, places, strict=True)]
    again = [draw.shuffled(lines) for _ in range(draw.pick((1, 2)))]
    return told([*lines, *(line for each in again for line in each)])


def echo(world: World, draw: Draw) -> str:
    """A call and its echo, which teaches to look back for what came after a word.

    At the distance that sentences have.
    """
    items = draw.pick((PEOPLE, THINGS + PLACES, TOWNS + JOBS + FOODS))
    call = draw.pick((" ", ", ", " and ", " and the ")).join(draw.some(items, draw.pick((4, 5))))
    speakers = draw.some(PEOPLE, draw.pick((2, 3)))
    return told([f"{speaker}: {call}" for speaker in speakers])


def called(world: World, draw: Draw) -> str:
    """A few words and the same again, at once: the quickest way to learn to look back for what came after a word."""
    call = " ".join(draw.some(draw.pick(CALLED), draw.pick((2, 3, 4))))
    return told([call, call])


def coupled(world: World, draw: Draw) -> str:
    """Couples of words and the same in another order, which teaches to look back for what a word goes with."""
    ones, others = draw.some(CALLED, 2)
    n, link = draw.pick((2, 2, 2, 3)), draw.pick((" ", " ", " is ", " has "))
    couples = [
        f"{a}{link}{b}" for a, b in zip(draw.some(ones, n), draw.some(others, n), strict=True)
    ]
    return told([*couples, *draw.shuffled(couples)])


def going(world: World, draw: Draw) -> str:
    """Where people go, and where they are then."""
    people, places = draw.some(PEOPLE, 3), draw.some(PLACES, 3)
    lines = [f"{people[0]} went to the {places[0]}", f"{people[1]} went to the {places[1]}"]
    at = [places[0], places[1]]
    if draw.heads():
        mover = draw.below(2)
        lines.append(f"then {people[mover]} went to the {places[2]}")
        at[mover] = places[2]
    who = draw.below(2)
    guess = draw.pick(at)
    lines.append(f"is {people[who]} at the {guess}?")
    if guess == at[who]:
        lines.append(f"yes, {people[who]} is at the {guess}")
    else:
        lines.append(f"no, {people[who]} is at the {at[who]}")
    return told(lines)


def not_told(world: World, draw: Draw) -> str:
    """Of somebody no place is told, so the answer is maybe."""
    a, b, c = draw.some(PEOPLE, 3)
    place, thing = draw.pick(PLACES), draw.pick(THINGS)
    who, answer = draw.pick(((a, f"yes, {a} is at the {place}"), (b, "maybe, i do not know")))
    facts = draw.shuffled([f"{a} is at the {place}", f"{b} has a {thing}"])
    return told([*facts, f"is {who} at the {place}?", answer])


def other_side(world: World, draw: Draw) -> str:
    """A relation told from both sides, and what it does not mean."""
    a, b = draw.some(PEOPLE, 2)
    thing, forms = draw.pick(THINGS), draw.shuffled(draw.pick(CONVERSES))
    one, two = (form.format(a=a, b=b, t=thing) for form in forms)
    turned = draw.pick(forms).format(a=b, b=a, t=thing)
    first = [one, f"so {two}"]
    return told(first if draw.heads() else [*first, f"it is not true that {turned}"])


def chain(world: World, draw: Draw) -> str:
    """Comparisons of three people, and what follows from them."""
    forms = draw.pick(COMPARISONS)
    a, b, c = draw.some(PEOPLE, 3)
    lines = draw.shuffled([draw.pick(forms).format(a=x, b=y) for x, y in ((a, b), (b, c))])
    true = draw.heads()
    said = draw.pick(forms).format(a=a, b=c)
    if true and draw.heads():
        return told([*lines, f"so {said}"])
    turned = draw.pick(forms).format(a=c, b=a)
    subject, rest = (said if true else turned).split(" is ")
    return told([*lines, f"is {subject} {rest}?", f"{'yes' if true else 'no'}, {said}"])


def truth(world: World, draw: Draw) -> str:
    """Somebody says something, somebody what follows, or does not, and the first whether it is so."""
    line, right, wrong = draw.pick((gathered, moved))(draw, draw.pick(PEOPLE), of=2)
    one, two = draw.some(STRANGERS, 2)
    claim, verdict_ = draw.pick(((right, "yes, that is true"), (wrong, "no, that is false")))
    return told([f"{one}: {line}", f"{two}: so {claim}", f"{one}: {verdict_}"])


def follows(world: World, draw: Draw) -> str:
    """What people did, and what is so hence."""
    lines = []
    for person in draw.some(PEOPLE, 2):
        line, claim = draw.pick((gathered, moved))(draw, person, of=1)
        lines += [line, f"so {claim}"]
    return told(lines)


def cause(world: World, draw: Draw) -> str:
    """What people did because of how they were, in either order."""
    lines = []
    for person, (state, action) in zip(draw.some(PEOPLE, 2), draw.some(CAUSES, 2), strict=True):
        he = pronoun(person)
        lines.append(
            draw.pick(
                (
                    f"{person} {state}, so {he} {action}",
                    f"{person} {action} because {he} {state}",
                    f"why did {person} do it? {he} {action} because {he} {state}",
                    f"{person} {state}. then {he} {action}",
                )
            )
        )
    return told(lines)


def reason(world: World, draw: Draw) -> str:
    """Who did what to whom and why, and of whom the reason speaks."""
    people = same_gender(draw, 2)
    *forms, first, second = draw.pick(REASONS)
    meant = draw.below(2)
    said = draw.pick(forms).format(a=people[0], b=people[1])
    why = (first, second)[meant]
    he = pronoun(people[0])
    lines = draw.pick(
        (
            [f"{said} because {he} {why}", f"{people[meant]} {why}"],
            [f"{people[meant]} {why}, so {said}"],
            [f"{said} because {people[meant]} {why}"],
            [f"{said} because {he} {why}", f"who {why}? {people[meant]} {why}"],
            [f"{said} because {he} {why}", f"it was {people[meant]} who {why}"],
        )
    )
    return told(lines)


def using(world: World, draw: Draw) -> str:
    """What people took and what they did with it."""
    people, things = draw.some(PEOPLE, 2), draw.some(THINGS, 2)
    taken = [f"{p} took a {t}" for p, t in zip(people, things, strict=True)]
    used = [f"then {p} {USES[t]} the {t}" for p, t in zip(people, things, strict=True)]
    return told([*draw.shuffled(taken), *draw.shuffled(used)])


def handling(world: World, draw: Draw) -> str:
    """Somebody has two things and uses one; which was meant."""
    sentence, things, meant = handled(draw)
    thing = f"the {things[meant]}"
    one = sentence.format(x=draw.pick(("it", thing)))
    return told([one, draw.pick((f"it was {thing}", f"{thing} was {draw.pick(('old', 'new'))}"))])


def meaning(world: World, draw: Draw) -> str:
    """Where a word is met in one of its meanings, and what it is there."""
    word = draw.pick(sorted(SENSES))
    what, places = draw.pick(SENSES[word])
    lines = [f"{draw.pick(TIMES)} {place}" for place in draw.some(places, draw.pick((1, 2)))]
    return told([*lines, f"this {word} is a {what}"])


def review(world: World, draw: Draw) -> str:
    """What somebody thinks of a thing or a play."""
    if draw.heads():
        level = draw.pick(STARS)
        lines = [f"i bought the {draw.pick(THINGS)} in {draw.pick(TOWNS)}", *draw.some(level, 3)]
    else:
        good = draw.heads()
        lines = [verdict(draw, part, good=good) for part in draw.some(PARTS, 2)]
        lines.append("i like it" if good else "i do not like it")
    return told(lines)


def tidings(world: World, draw: Draw) -> str:
    """News of one topic under its name."""
    topic = draw.pick(sorted(NEWS))
    forms = draw.some(NEWS[topic], 3)
    return told(
        [f"news of {topic}", *(f.format(p=draw.pick(PEOPLE), t=draw.pick(TOWNS)) for f in forms)]
    )


def described(world: World, draw: Draw) -> str:
    """What is true of a kind of things."""
    kind = draw.pick(sorted(DESCRIBED))
    name = draw.pick(STRANGERS)
    return told([f"{name} is a {kind}", *draw.shuffled(DESCRIBED[kind])])


def of_a_kind(world: World, draw: Draw) -> str:
    """Things of a kind, and the kind."""
    kind = draw.pick(sorted(KINDS))
    one, two, three = draw.some(KINDS[kind], 3)
    person = draw.pick(PEOPLE)
    if draw.heads():
        return told([f"a {one} is a {kind}", f"a {two} and a {three} are of the same kind"])
    return told(
        [
            f"{person} bought a {one}, a {two} and a {three}",
            f"{pronoun(person)} has {SOME[kind]} now",
        ]
    )


def meeting(world: World, draw: Draw) -> str:
    """A story of two people, and what is worth telling of it."""
    one, two = draw.some(PEOPLE, 2)
    place, thing = draw.pick(PLACES), draw.pick(THINGS)
    return told(
        [
            draw.pick(FILLERS),
            f"{one} went to the {place}",
            f"there {pronoun(one)} met {two}",
            f"{two} gave {one} a {thing}",
            f"in short, {one} got a {thing} from {two} at the {place}",
        ]
    )


def introduced(world: World, draw: Draw) -> str:
    """A stranger who says who they are, and what somebody then tells of them."""
    name, job, town = draw.pick(STRANGERS), draw.pick(JOBS), draw.pick(TOWNS)
    food, pet = draw.pick(FOODS), draw.pick(PETS)
    return told(
        [
            f"{name}: my name is {name}",
            f"my job is {job} and my town is {town}",
            f"{name} is a {job} from {town} who likes {food} and has a {pet}",
        ]
    )


def doing(world: World, draw: Draw) -> str:
    """What animals and people want to do and then do."""
    look, place, verb = draw.pick(LOOKS), draw.pick(PLACES), draw.pick(sorted(DOINGS))
    actor = draw.pick(PETS + JOBS)
    return told(
        [
            f"the {look} {actor} is going to {verb} in the {place}",
            f"so the {look} {actor} {DOINGS[verb]} in the {place}",
        ]
    )


def fed(world: World, draw: Draw) -> str:
    """What food does to people."""
    foods, people = draw.some(FOODS, 2), draw.some(PEOPLE, 2)
    effects = draw.some(sorted(OPPOSITES), 2)
    lines = [f"{f} makes you {e}" for f, e in zip(foods, effects, strict=True)]
    eaten = [f"{p} ate {f}" for p, f in zip(people, foods, strict=True)]
    which = draw.below(2)
    return told(
        [
            *draw.shuffled(lines),
            *draw.shuffled(eaten),
            f"so {people[which]} is {effects[which]} now",
        ]
    )


def said(world: World, draw: Draw) -> str:
    """People who say where they go, and where they are found."""
    n = draw.pick((2, 3))
    people, places = draw.some(PEOPLE, n), draw.some(PLACES, n)
    lines = [
        f"{p}: i am going to the {q}" if draw.heads() else f"{p}: you will find me at the {q}"
        for p, q in zip(people, places, strict=True)
    ]
    which = draw.below(n)
    return told([*lines, f"{people[which]} is going to the {places[which]}"])


def knowledge(world: World, draw: Draw) -> str:
    """Opposites, days and numbers."""
    word, opposite = draw.pick(sorted(OPPOSITES.items()))
    sequence = draw.pick((DAYS, NUMBERS))
    start = draw.below(len(sequence) - 3)
    return told(
        [
            f"{word} is the opposite of {opposite}"
            if draw.heads()
            else f"{opposite} is the opposite of {word}",
            ", ".join(sequence[start : start + 4]),
        ]
    )


Writer = Callable[[World, Draw], str]
# How often each is written, out of their sum: facts are many and each is only learnt where it is told.
SHARES: dict[Writer, int] = {
    life: 3,
    life_described: 4,
    asked_about: 3,
    put_away: 4,
    repeated: 3,
    called: 60,
    coupled: 15,
    echo: 3,
    going: 3,
    not_told: 2,
    other_side: 4,
    chain: 2,
    truth: 6,
    follows: 6,
    cause: 2,
    reason: 3,
    using: 2,
    handling: 2,
    meaning: 2,
    review: 2,
    tidings: 1,
    described: 1,
    of_a_kind: 1,
    meeting: 1,
    introduced: 1,
    doing: 1,
    fed: 2,
    said: 2,
    knowledge: 1,
}
WRITERS: tuple[Writer, ...] = tuple(w for w, share in SHARES.items() for _ in range(share))
