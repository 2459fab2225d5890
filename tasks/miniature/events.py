"""What can be said of people and things in a sentence, and what follows from what.

`CONVERSES` are relations that can be told from either side; `CAUSES` are states and what people do because of them; `REASONS`
say which of two people a reason speaks of; `SENSES` are words that mean two things. The corpus tells all of them.
"""

from __future__ import annotations

# Each told in two ways that mean the same. `{t}` is a thing.
CONVERSES = (
    ("{a} gave the {t} to {b}", "{b} got the {t} from {a}"),
    ("{a} sold the {t} to {b}", "{b} bought the {t} from {a}"),
    ("{a} lent the {t} to {b}", "{b} borrowed the {t} from {a}"),
    ("{a} is taller than {b}", "{b} is shorter than {a}"),
    ("{a} is older than {b}", "{b} is younger than {a}"),
    ("{a} is faster than {b}", "{b} is slower than {a}"),
    ("{a} came before {b}", "{b} came after {a}"),
    ("{a} called {b}", "{b} was called by {a}"),
    ("{a} helped {b}", "{b} was helped by {a}"),
    ("{a} followed {b}", "{b} was followed by {a}"),
)
COMPARISONS = CONVERSES[3:6]  # those that also hold over a chain

# How a person is, and what the person then does.
CAUSES = (
    ("was thirsty", "drank some water"),
    ("was hungry", "ate some food"),
    ("was tired", "went to bed"),
    ("was cold", "lit a fire"),
    ("was ill", "saw a doctor"),
    ("was sad", "began to cry"),
    ("was glad", "sang a song"),
    ("was dirty", "took a bath"),
    ("was late", "began to run"),
    ("was lost", "asked the way"),
    ("was rich", "bought a boat"),
    ("was hot", "went for shade"),
    ("was afraid", "hid in fear"),
    ("was bored", "read a story"),
    ("was angry", "shouted out loud"),
    ("was proud", "told the news"),
)

# What one did to another, told from either side, with a reason that is in the first person named, and one in the second.
REASONS = (
    ("{a} fed {b}", "{b} was fed by {a}", "was kind", "was hungry"),
    ("{a} thanked {b}", "{b} was thanked by {a}", "had got help", "had given help"),
    ("{a} carried {b}", "{b} was carried by {a}", "was strong", "was tired"),
    ("{a} asked {b}", "{b} was asked by {a}", "was lost", "was wise"),
    ("{a} feared {b}", "{b} was feared by {a}", "was weak", "was angry"),
    ("{a} beat {b} in the game", "{b} was beaten in the game by {a}", "was fast", "was slow"),
    ("{a} paid {b}", "{b} was paid by {a}", "was rich", "had done the work"),
    ("{a} nursed {b}", "{b} was nursed by {a}", "was good", "was ill"),
)

# A word, and for each of its two meanings what it is and where it is met. No two places of a meaning share a noun or verb.
SENSES = {
    "bat": (
        ("an animal", ("the bat ate a fly", "a bat slept in the barn", "the old bat had wings")),
        ("a stick", ("he hit the ball with a bat", "the team lost the bat", "she held a bat in the game")),
    ),
    "bank": (
        ("a shore", ("they sat on the bank by the water", "a boat lay at the bank", "fish swam near the bank")),
        ("a shop for money", ("the bank paid him", "she works at the rich bank", "he took gold to the bank")),
    ),
    "bark": (
        ("a noise", ("the bark of the dog was loud", "he heard a bark", "a bark woke the cat")),
        ("the skin of a tree", ("leaves and bark fell", "the bark of the wood was dry", "he cut the bark with a knife")),
    ),
    "ring": (
        ("a jewel", ("she wore a ring of gold", "he lost the ring from a hand", "the queen has a ring")),
        ("a noise", ("he heard the ring of the bell", "a loud ring woke her", "the ring came from the church")),
    ),
    "match": (
        ("a game", ("the team won the match", "they kicked the ball in the match", "he played a match")),
        ("a fire stick", ("she lit the lamp with a match", "the match was hot", "a wet match does not burn")),
    ),
    "spring": (
        ("a season", ("in spring the flowers come", "birds sing in spring", "after the snow came spring")),
        ("a place of water", ("he drank from the spring", "the spring runs to the river", "they filled the cup at the spring")),
    ),
    "seal": (
        ("an animal", ("the seal swam in the sea", "a seal ate fish", "the young seal slept on the sand")),
        ("a mark", ("the letter has a seal", "he broke the seal of the king", "she put a red seal on the page")),
    ),
    "palm": (
        ("a tree", ("the palm has leaves", "they sat in the shade of a palm", "a palm grows by the sea")),
        ("a part of the hand", ("he held a coin in the palm", "she read the palm of the man", "a cut in the palm was red")),
    ),
}  # fmt: skip
