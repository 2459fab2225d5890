"""The closed vocabulary: every word and mark that any text of the miniature holds, and no other.

The order is that of the ids, so a checkpoint's embedding belongs to this list: a new word goes to its end.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.vocabularies import WordVocabulary

TOKEN = re.compile(
    r"\w+(?:'\w+)*|[^\w\s]"
)  # as tasks.vocabularies has it, which imports TensorFlow

MARKS = (",", ".", ":", ";", "?")
WORDS = """
    _ a about afraid after all along am among an and angry animal anna answer are as ask asked
    asks at ate awful bad bag baker ball band bank bark barn barrow bat bath beat beaten because
    bed before began bell ben best big bird birds black blue boat boats bob book bored borrowed
    bought box bread bridge broke brush burn burned butter buy by cake called calls came can
    carried carries cart cat cause cheese cherry children choose church clara clean climb
    clothes coat coins cold come comes costs creature creatures crown cry cup cups cut dance
    danced day days did dirty do doctor does dog doll done dover down drank drew driver drum dry
    duck dull each early eat effect eight ella emma empty end ended fair false farmer fast
    faster fear feared fed fell fig filled find fine finn fins fire first fish five flower
    flowers fly followed food for found four friday friend frog from fruit full game garden
    garment gave get given glad glove go goat goes going gold good goods got great green grow
    grows gwen had hammer hand harbour has hat hate have he heard held help helped hen her hid
    hide high hill him his hit home honey horse hot how hugo hungry i ill in is it ivo jack jane
    jewel job karl keep kelso key kicked kind king kings kit kitchen kite knife know known lamp
    land last late lay learn leave leaves left lemon lena lent leo letter library like likes
    lily linden lit live lives lost loud love lovely made make makes man many mark market marlow
    match max maybe me mean means meant meat met mia mill monday money more morning mouse music
    my name near ned needle new news next night nine no noise nora not now nursed of old older
    on once one opened opposite or others otto out over page pages paid painter palm park
    paul peach pear people person pet pia plant play played players plum poor proud pulled
    puppet pushed put queen question race rained rake ran rang read red rest review rex rice
    rich right ring river rope rosa rules run runs ruth sad sailor sailors sails sam same sand
    sang sat saturday saw say says scarf school sea seal season second selby sells sentence
    sentences seven shade share she ship shirt shop shore short shorter shouted sing singer
    sings sit six skin sky sleep slept slow slower small smells snow so sock sold some song soon
    soup spade sport spring star stars station stick storm story streets strong sun sunday swam
    sweet swims table talk tall taller teacher teachers team tell ten text than thanked that the
    then there these they things thirsty this thorne three thursday tired to today told tom took
    tool tools top topic town toy toys trade trained tree trees true tuesday turned two uma
    under up upon us vera very wait waited walk walked want warm was washed water way we weak
    weather wednesday well wells went wet what where which white who why will wind wings wise
    with woke won wood word words wore work works wrong yellow yes you young younger zoe here them
""".split()


def words() -> tuple[str, ...]:
    """All words and marks in the order of their ids, which begin with 3: 0 is padding, 1 the end, 2 the unknown."""
    return (*MARKS, *WORDS)


def vocabulary() -> WordVocabulary:
    """The same as a seqio vocabulary."""
    from tasks.vocabularies import WordVocabulary

    return WordVocabulary(words())
