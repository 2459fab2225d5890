"""How the rows of the miniature are asked: three wordings a dataset, in our own words.

A template names fields of the row; `{listed}` are the row's choices, joined by "or".
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.dataset import Generated, Ranked
from tasks.miniature.lexicon import KINDS, NUMBERS
from tasks.miniature.topics import KIND_NAMES, TOPICS

# In the order of the labels.
YES_NO = ("yes", "no")
NO_YES = ("no", "yes")
TRUE_FALSE = ("true", "false")
FALSE_TRUE = ("false", "true")
STARS = NUMBERS[:5]
NAMES_OF_KINDS = tuple(sorted(KINDS))

PROMPTS: Mapping[str, Mapping[str, Ranked | Generated]] = {
    "dialogues": {
        "question": Ranked(inputs="{dialogue} question: {question} answer:", choices="choices"),
        "choose": Ranked(
            inputs="read the talk and answer. {dialogue} {question} choose: {listed}. answer:",
            choices="choices",
        ),
        "ask_first": Ranked(
            inputs="{question} choose: {listed}. this is what they say: {dialogue} answer:",
            choices="choices",
        ),
    },
    "motives": {
        "question": Ranked(inputs="{passage} question: {question} answer:", choices="choices"),
        "choose": Ranked(
            inputs="read the text and answer. {passage} {question} choose: {listed}. answer:",
            choices="choices",
        ),
        "because": Ranked(inputs="{passage} {question} because", choices="choices"),
    },
    "belongings": {
        "question": Generated(inputs="{passage} question: {question} answer:", targets="{answer}"),
        "read": Generated(
            inputs="read the text and answer. {passage} {question} answer:", targets="{answer}"
        ),
        "ask_first": Generated(
            inputs="question: {question} text: {passage} answer:", targets="{answer}"
        ),
    },
    "rules": {
        "question": Generated(
            inputs="{background} {situation} question: {question} answer:", targets="{answer}"
        ),
        "read": Generated(
            inputs="read the text and answer. {background} {situation} {question} answer:",
            targets="{answer}",
        ),
        "ask_first": Generated(
            inputs="question: {question} this is known: {background} text: {situation} answer:",
            targets="{answer}",
        ),
    },
    "facts": {
        "question": Generated(inputs="question: {question} answer:", targets="{answer}"),
        "one_word": Generated(inputs="{question} answer in one word:", targets="{answer}"),
        "tell_me": Generated(inputs="tell me, {question} answer:", targets="{answer}"),
    },
    "answers": {
        "right": Ranked(
            inputs="question: {question} answer: {answer} is the answer right?", choices=YES_NO
        ),
        "is_true": Ranked(
            inputs="{question} one says: {answer} is this true? answer:", choices=YES_NO
        ),
        "true_or_false": Ranked(
            inputs="{question} {answer} true or false? answer:", choices=TRUE_FALSE
        ),
    },
    "products": {
        "how_many": Ranked(inputs="{review} how many stars does it get? answer:", choices=STARS),
        "stars": Ranked(inputs="review: {review} stars:", choices=STARS),
        "scale": Ranked(inputs="one star is bad and five is good. {review} stars:", choices=STARS),
    },
    "plays": {
        "good_or_bad": Ranked(
            inputs="{review} is this review good or bad? answer:", choices=("bad", "good")
        ),
        "one_says": Ranked(
            inputs="review: {review} one says the play was", choices=("bad", "good")
        ),
        "liked": Ranked(inputs="{review} did they like the play? answer:", choices=NO_YES),
    },
    "news": {
        "about": Ranked(inputs="{text} what is this about? answer:", choices=TOPICS),
        "choose": Ranked(
            inputs="{text} choose the topic: sport or music or trade or weather. answer:",
            choices=TOPICS,
        ),
        "topic": Ranked(inputs="news: {text} topic:", choices=TOPICS),
    },
    "kinds": {
        "what_is_it": Ranked(inputs="{text} what is it? answer: a", choices=KIND_NAMES),
        "kind": Ranked(inputs="text: {text} kind:", choices=KIND_NAMES),
        "this_is": Ranked(inputs="{text} this is a", choices=KIND_NAMES),
    },
    "concepts": {
        "words": Generated(inputs="words: {concepts}. make a sentence:", targets="{target}"),
        "say_with": Generated(
            inputs="say it with these words: {concepts}. answer:", targets="{target}"
        ),
        "make": Generated(inputs="make a sentence of {concepts}. answer:", targets="{target}"),
    },
    "lives": {
        "sentence": Generated(inputs="{table}. make a sentence:", targets="{target}"),
        "tell_me": Generated(inputs="tell me of this person. {table}. answer:", targets="{target}"),
        "say_it": Generated(inputs="say it in one sentence: {table}. answer:", targets="{target}"),
    },
    "highlights": {
        "in_short": Generated(inputs="{story} in short:", targets="{summary}"),
        "story": Generated(
            inputs="story: {story} what did they do? in short:", targets="{summary}"
        ),
        "two_sentences": Generated(
            inputs="tell it in two sentences: {story} answer:", targets="{summary}"
        ),
    },
    "gist": {
        "one_sentence": Generated(inputs="{story} in one sentence:", targets="{summary}"),
        "story": Generated(
            inputs="story: {story} what is this about? in one sentence:", targets="{summary}"
        ),
        "tell_it": Generated(
            inputs="tell it in one sentence: {story} answer:", targets="{summary}"
        ),
    },
    "sentences": {
        "mean_the_same": Ranked(
            inputs="{sentence1}. {sentence2}. do they mean the same? answer:", choices=NO_YES
        ),
        "to_say": Ranked(
            inputs="one says: {sentence1}. is it the same to say: {sentence2}? answer:",
            choices=NO_YES,
        ),
        "so": Ranked(
            inputs="{sentence1}. so {sentence2}. true or false? answer:", choices=FALSE_TRUE
        ),
    },
    "questions": {
        "mean_the_same": Ranked(
            inputs="{question1} {question2} do they mean the same? answer:", choices=NO_YES
        ),
        "to_ask": Ranked(
            inputs="one asks: {question1} is it the same to ask: {question2} answer:",
            choices=NO_YES,
        ),
        "these_two": Ranked(
            inputs="these two ask the same: {question1} {question2} true or false? answer:",
            choices=FALSE_TRUE,
        ),
    },
    "causes": {
        "go_on": Ranked(inputs="{begun} {link}", choices="choices"),
        "what_is": Ranked(
            inputs="{begun}. what is the {asked} of this? answer:", choices="choices"
        ),
        "choose": Ranked(
            inputs="text: {begun}. choose the {asked}: {listed}. answer:", choices="choices"
        ),
    },
    "endings": {
        "go_on": Ranked(inputs="{story} {begun}", choices="choices"),
        "read": Ranked(
            inputs="read the story and say how it goes on. {story} {begun}", choices="choices"
        ),
        "story": Ranked(inputs="story: {story} {begun} what? answer:", choices="choices"),
    },
    "statements": {
        "so": Ranked(inputs="{passage} so", choices="choices"),
        "read": Ranked(
            inputs="read the text and answer. {passage} what is true then? answer:",
            choices="choices",
        ),
        "choose": Ranked(
            inputs="text: {passage} choose what is true then: {listed} answer:", choices="choices"
        ),
    },
    "entailment": {
        "so": Ranked(inputs="{premise} so", choices="choices"),
        "then": Ranked(inputs="{premise} which is true then: {listed} answer:", choices="choices"),
        "question": Ranked(
            inputs="text: {premise} question: what is true then? answer:", choices="choices"
        ),
    },
    "pronouns": {
        "it_was": Ranked(inputs="{text} it was", choices="choices"),
        "mean": Ranked(inputs="{text} what does the word {word} mean? answer:", choices="choices"),
        "choose": Ranked(
            inputs="text: {text} question: who or what is {word}? choose: {listed}. answer:",
            choices="choices",
        ),
    },
    "gaps": {
        "go_on": Ranked(inputs="{begun}", choices=("{choices[0]}{rest}", "{choices[1]}{rest}")),
        "who": Ranked(inputs="{sentence} who or what is _? answer:", choices="choices"),
        "choose": Ranked(
            inputs="{sentence} question: what is meant by _? choose: {listed}. answer:",
            choices="choices",
        ),
        "text": Ranked(inputs="text: {sentence} which word is _? answer:", choices="choices"),
    },
    "senses": {
        "here": Ranked(inputs="{text} here the {word} is a", choices="choices"),
        "what": Ranked(inputs="{text} what is the {word} here? answer: a", choices="choices"),
        "choose": Ranked(
            inputs="text: {text} choose what the word {word} means: {listed}. answer:",
            choices="choices",
        ),
    },
    "opposites": {
        "which": Generated(
            inputs="words: {words}. which is the opposite of {word}? answer:", targets="{answer}"
        ),
        "question": Generated(
            inputs="question: which of {words} is the opposite of {word}? answer:",
            targets="{answer}",
        ),
        "among": Generated(
            inputs="the opposite of {word} is among {words}. answer:", targets="{answer}"
        ),
    },
    "counting": {
        "how_many": Generated(
            inputs="{passage} how many people are there? answer:", targets="{answer}"
        ),
        "read": Generated(
            inputs="read the text and answer. {passage} how many people went out? answer:",
            targets="{answer}",
        ),
        "ask_first": Generated(
            inputs="question: how many people are in the text? text: {passage} answer:",
            targets="{answer}",
        ),
    },
    "odd_one": {
        "which": Generated(
            inputs="words: {words}. which is of no kind with the others? answer:",
            targets="{answer}",
        ),
        "question": Generated(
            inputs="question: which of {words} is not like the others? answer:", targets="{answer}"
        ),
        "choose": Generated(
            inputs="choose the word that is not like the others: {words}. answer:",
            targets="{answer}",
        ),
    },
    "same_kind": {
        "a_and_a": Ranked(
            inputs="a {one} and a {two}: are they of the same kind? answer:", choices=YES_NO
        ),
        "question": Ranked(
            inputs="question: is a {one} the same kind as a {two}? answer:", choices=YES_NO
        ),
        "true_or_false": Ranked(
            inputs="a {one} and a {two} are of the same kind. true or false? answer:",
            choices=TRUE_FALSE,
        ),
    },
    "well_made": {
        "right": Ranked(inputs="{sentence} is this sentence right? answer:", choices=YES_NO),
        "question": Ranked(
            inputs="question: is this a good sentence? {sentence} answer:", choices=YES_NO
        ),
        "true_or_false": Ranked(
            inputs="this is a good sentence: {sentence} true or false? answer:", choices=TRUE_FALSE
        ),
    },
    "asking": {
        "make": Generated(inputs="{passage} make a question about {about}:", targets="{question}"),
        "read": Generated(
            inputs="read the text and ask about {about}. {passage} question:", targets="{question}"
        ),
        "text": Generated(
            inputs="text: {passage} what can one ask about {about}? answer:", targets="{question}"
        ),
    },
    "positions": {
        "which": Generated(
            inputs="words: {words}. which is the {which}? answer:", targets="{answer}"
        ),
        "say": Generated(inputs="say the {which} word of {words}. answer:", targets="{answer}"),
        "question": Generated(
            inputs="question: what is the {which} word? words: {words}. answer:", targets="{answer}"
        ),
    },
    "sequences": {
        "next": Generated(inputs="{words}, what is next? answer:", targets="{answer}"),
        "after": Generated(inputs="what comes after {words}? answer:", targets="{answer}"),
        "say": Generated(inputs="words: {words}. say the next:", targets="{answer}"),
    },
    "finding": {
        "which": Generated(
            inputs="{passage} which {kind} is in the text? answer:", targets="{answer}"
        ),
        "read": Generated(
            inputs="read the text and answer. {passage} tell me the {kind}. answer:",
            targets="{answer}",
        ),
        "ask_first": Generated(
            inputs="question: which {kind} is it? text: {passage} answer:", targets="{answer}"
        ),
    },
    "mentioned": {
        "is_in": Ranked(inputs="{passage} is {person} in the text? answer:", choices=YES_NO),
        "question": Ranked(
            inputs="text: {passage} question: is it about {person}? answer:", choices=YES_NO
        ),
        "true_or_false": Ranked(
            inputs="{passage} {person} is in the text. true or false? answer:", choices=TRUE_FALSE
        ),
    },
    "repeating": {
        "say": Generated(inputs="{passage} say the {which} sentence. answer:", targets="{answer}"),
        "which": Generated(
            inputs="text: {passage} which is the {which} sentence? answer:", targets="{answer}"
        ),
        "read": Generated(
            inputs="read the text and tell me the {which} sentence. {passage} answer:",
            targets="{answer}",
        ),
    },
    "going_on": {
        "go_on": Generated(inputs="go on: {begun}", targets="{rest}"),
        "text": Generated(inputs="text: {begun} how does it go on? answer:", targets="{rest}"),
        "read": Generated(inputs="read the text and go on. {begun}", targets="{rest}"),
    },
    "ordering": {
        "words": Generated(inputs="words: {words}. put them right:", targets="{sentence}"),
        "say": Generated(inputs="put these words right: {words}. answer:", targets="{sentence}"),
        "which": Generated(
            inputs="which sentence has the words {words}? answer:", targets="{sentence}"
        ),
    },
    "telling": {
        "of": Generated(inputs="{passage} what is told of {person}? answer:", targets="{answer}"),
        "read": Generated(
            inputs="read the text and tell me of {person}. {passage} answer:", targets="{answer}"
        ),
        "ask_first": Generated(
            inputs="question: which sentence is about {person}? text: {passage} answer:",
            targets="{answer}",
        ),
    },
    "naming": {
        "kind": Ranked(inputs="of which kind is a {thing}? answer:", choices=NAMES_OF_KINDS),
        "what": Ranked(inputs="question: what is a {thing}? answer: a", choices=NAMES_OF_KINDS),
        "say": Ranked(inputs="say the kind of this word: {thing}. kind:", choices=NAMES_OF_KINDS),
    },
}
