"""What can be said of people and things in a sentence, and what follows from what.

`CONVERSES` are relations that can be told from either side; `CAUSES` are states and what people do because of them;
`REASONS` say which of two people a reason speaks of; `SENSES` are words that mean two things. The corpus tells all
of them.
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

# What one did to another, told from either side, with a reason that lies in the one who did it, and one in the other.
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

# A word, and for each of its two meanings what it is, which no place has, and where it is met. "the" stands in every place, and no
# two places of a word share anything else: shared words would tell that two places are of one meaning.
SENSES = {
    "bat": (
        (
            "creature",
            (
                "the bat ate a fly",
                "an old bat slept in the barn",
                "the bat had wings",
                "the small bat came by night",
                "birds fear the bat",
            ),
        ),
        (
            "stick",
            (
                "he hit the ball with this bat",
                "the team lost one bat",
                "she held the bat and won",
                "the bat is made of wood",
                "players share the bat",
            ),
        ),
    ),
    "bank": (
        (
            "shore",
            (
                "they sat on the bank",
                "a boat lay at the bank",
                "fish swam near the bank",
                "the bank by this river was wet",
                "flowers grow all along the bank",
            ),
        ),
        (
            "shop",
            (
                "the bank paid him",
                "she works for the rich bank",
                "he took gold to the bank",
                "the bank has coins",
                "we keep money in the bank",
            ),
        ),
    ),
    "bark": (
        (
            "noise",
            (
                "the bark was loud",
                "he heard the bark",
                "a bark woke the cat",
                "the dog gave this bark",
                "all people fear the bark",
            ),
        ),
        (
            "skin",
            (
                "the leaves and bark fell",
                "the bark burned in fire",
                "she cut the bark with his knife",
                "the bark is dry",
                "under the bark hid ten birds",
            ),
        ),
    ),
    "ring": (
        (
            "jewel",
            (
                "she wore the ring of gold",
                "he lost the ring on monday",
                "the queen has a ring",
                "we saw the ring upon her hand",
                "the rich want this ring",
            ),
        ),
        (
            "noise",
            (
                "they heard the ring",
                "one loud ring woke the dog",
                "the ring came from church",
                "all people know the ring",
                "the ring calls us to school",
            ),
        ),
    ),
    "match": (
        (
            "game",
            (
                "the team won this match",
                "they kicked in the match",
                "players trained for the match",
                "we saw the match",
                "the match ended at night",
            ),
        ),
        (
            "stick",
            (
                "she lit the lamp with a match",
                "the match was hot",
                "wet is the match and does not burn",
                "he broke the match",
                "the match gave us fire",
            ),
        ),
    ),
    "spring": (
        (
            "season",
            (
                "the flowers come in spring",
                "birds sing all the spring",
                "after the snow came spring",
                "the days grow warm by spring",
                "we plant the garden each spring",
            ),
        ),
        (
            "well",
            (
                "he drank from the spring",
                "the spring runs to a river",
                "they filled cups at the spring",
                "the spring was dry",
                "cold is the water of this spring",
            ),
        ),
    ),
    "seal": (
        (
            "creature",
            (
                "the seal swam in water",
                "a seal ate the fish",
                "one young seal slept on the sand",
                "the seal hid from him",
                "children fed the seal",
            ),
        ),
        (
            "mark",
            (
                "the letter has this seal",
                "he broke the seal of wood",
                "she put her red seal to the page",
                "the seal was made by kings",
                "no seal held the box",
            ),
        ),
    ),
    "palm": (
        (
            "tree",
            (
                "the palm has leaves",
                "they sat in shade by the palm",
                "one palm grows near the sea",
                "the palm was tall",
                "birds rest upon the palm",
            ),
        ),
        (
            "hand",
            (
                "he held coins on the palm",
                "she read the palm of a man",
                "red is the palm from fire",
                "his palm hit the table",
                "we washed the palm with water",
            ),
        ),
    ),
}
