"""How the rows of the miniature are asked: at least three wordings a dataset, in our own words.

A prompt names fields of the row in braces; `{listed}` stands for the row's choices, joined by "or". The answers are fixed words in the
order of the labels, or the row's own choices, or a field of the row that is to be written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tasks.miniature.lexicon import NUMBERS
from tasks.miniature.topics import KIND_NAMES, TOPICS

YES_NO = ("yes", "no")
TRUE_FALSE = ("true", "false")
YES_NO_MAYBE = ("yes", "no", "maybe")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One wording.

    Attributes:
      inputs: the question, with fields of the row in braces.
      answers: fixed answers in the order of the labels, or the name of the field that holds the answer; "choices" is the
        row's own list.
    """

    inputs: str
    answers: tuple[str, ...] | str

    def render(self, row: dict[str, Any]) -> tuple[str, str, list[str] | None]:
        """(inputs, target, choices); choices is None where the answer is written, not chosen."""
        listed = " or ".join(row["choices"]) if "choices" in row else ""
        inputs = self.inputs.format(**row, listed=listed)
        if isinstance(self.answers, str) and self.answers != "choices":
            return inputs, row[self.answers], None
        choices = list(row["choices"] if self.answers == "choices" else self.answers)
        return inputs, choices[row["label"]], choices


def prompts(answers: tuple[str, ...] | str, *wordings: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(wording, answers) for wording in wordings)


PROMPTS: dict[str, tuple[Prompt, ...]] = {
    "dialogues": prompts(
        "choices",
        "{dialogue} question : {question} answer :",
        "read the talk and answer . {dialogue} {question} choose : {listed} . answer :",
        "{question} choose : {listed} . this is what they say : {dialogue} answer :",
    ),
    "motives": prompts(
        "choices",
        "{passage} question : {question} answer :",
        "read the text and answer . {passage} {question} choose : {listed} . answer :",
        "{passage} {question} because",
    ),
    "belongings": prompts(
        "answer",
        "{passage} question : {question} answer :",
        "read the text and answer . {passage} {question} answer :",
        "question : {question} text : {passage} answer :",
    ),
    "rules": prompts(
        "answer",
        "{background} {situation} question : {question} answer :",
        "read the text and answer . {background} {situation} {question} answer :",
        "question : {question} this is known : {background} text : {situation} answer :",
    ),
    "facts": prompts(
        "answer",
        "question : {question} answer :",
        "{question} answer in one word :",
        "tell me , {question} answer :",
    ),
    "answers": (
        *prompts(
            YES_NO,
            "question : {question} answer : {answer} is the answer right ?",
            "{question} one says : {answer} is this true ? answer :",
        ),
        *prompts(TRUE_FALSE, "{question} {answer} true or false ? answer :"),
    ),
    "products": prompts(
        NUMBERS[:5],
        "{review} how many stars does it get ? answer :",
        "review : {review} stars :",
        "one star is bad and five is good . {review} stars :",
    ),
    "plays": (
        *prompts(
            ("bad", "good"),
            "{review} is this review good or bad ? answer :",
            "review : {review} one says the play was",
        ),
        *prompts(("no", "yes"), "{review} did they like the play ? answer :"),
    ),
    "news": prompts(
        TOPICS,
        "{text} what is this about ? answer :",
        f"{{text}} choose the topic : {' or '.join(TOPICS)} . answer :",
        "news : {text} topic :",
    ),
    "kinds": prompts(
        KIND_NAMES,
        "{text} what is it ? answer : a",
        "text : {text} kind :",
        "{text} this is a",
    ),
    "concepts": prompts(
        "target",
        "words : {concepts} . make a sentence :",
        "say it with these words : {concepts} . answer :",
        "make a sentence of {concepts} . answer :",
    ),
    "lives": prompts(
        "target",
        "{table} . make a sentence :",
        "tell me of this person . {table} . answer :",
        "say it in one sentence : {table} . answer :",
    ),
    "highlights": prompts(
        "summary",
        "{story} in short :",
        "story : {story} what did they do ? in short :",
        "tell it in two sentences : {story} answer :",
    ),
    "gist": prompts(
        "summary",
        "{story} in one sentence :",
        "story : {story} what is this about ? in one sentence :",
        "tell it in one sentence : {story} answer :",
    ),
    "sentences": (
        *prompts(
            YES_NO,
            "{sentence1} . {sentence2} . do they mean the same ? answer :",
            "one says : {sentence1} . is it the same to say : {sentence2} ? answer :",
        ),
        *prompts(TRUE_FALSE, "{sentence1} . so {sentence2} . true or false ? answer :"),
    ),
    "questions": (
        *prompts(
            YES_NO,
            "{question1} {question2} do they mean the same ? answer :",
            "one asks : {question1} is it the same to ask : {question2} answer :",
        ),
        *prompts(TRUE_FALSE, "these two ask the same : {question1} {question2} true or false ? answer :"),
    ),
    "causes": prompts(
        "choices",
        "{premise} what is the {asked} of this ? answer :",
        "{premise} choose the {asked} : {listed} . answer :",
        "text : {premise} question : what is the {asked} ? choose : {listed} . answer :",
    ),
    "endings": prompts(
        "choices",
        "{story} {begun}",
        "read the story and say how it goes on . {story} {begun}",
        "story : {story} {begun} what ? answer :",
    ),
    "statements": prompts(
        YES_NO_MAYBE,
        "{passage} one says : {statement} is this true ? answer :",
        "read the text and answer . {passage} {statement} is it right ? yes or no or maybe ? answer :",
        "text : {passage} is it true to say : {statement} answer :",
    ),
    "entailment": (
        *prompts(
            YES_NO,
            "{premise} one says : {hypothesis} is this true ? answer :",
            "text : {premise} is it true to say : {hypothesis} answer :",
        ),
        *prompts(TRUE_FALSE, "{premise} so {hypothesis} true or false ? answer :"),
    ),
    "pronouns": (
        *prompts(
            YES_NO,
            "{text} does the word {pronoun} mean {person} ? answer :",
            "{text} is {pronoun} the same as {person} ? answer :",
        ),
        *prompts(TRUE_FALSE, "{text} {pronoun} is {person} . true or false ? answer :"),
    ),
    "gaps": prompts(
        "choices",
        "{sentence} who is _ ? answer :",
        "{sentence} question : who is meant by _ ? choose : {listed} . answer :",
        "text : {sentence} who is the word _ ? answer :",
    ),
    "senses": (
        *prompts(
            YES_NO,
            "{sentence1} {sentence2} does the word {word} mean the same ? answer :",
            "one says : {sentence1} one says : {sentence2} is it the same {word} ? answer :",
        ),
        *prompts(TRUE_FALSE, "{sentence1} {sentence2} the word {word} means the same . true or false ? answer :"),
    ),
    "opposites": prompts(
        "answer",
        "words : {words} . which is the opposite of {word} ? answer :",
        "question : which of {words} is the opposite of {word} ? answer :",
        "the opposite of {word} is among {words} . answer :",
    ),
    "counting": prompts(
        "answer",
        "{passage} how many people are there ? answer :",
        "read the text and answer . {passage} how many people went out ? answer :",
        "question : how many people are in the text ? text : {passage} answer :",
    ),
    "odd_one": prompts(
        "answer",
        "words : {words} . which is of no kind with the others ? answer :",
        "question : which of {words} is not like the others ? answer :",
        "choose the word that is not like the others : {words} . answer :",
    ),
    "same_kind": (
        *prompts(
            YES_NO,
            "a {one} and a {two} : are they of the same kind ? answer :",
            "question : is a {one} the same kind as a {two} ? answer :",
        ),
        *prompts(TRUE_FALSE, "a {one} and a {two} are of the same kind . true or false ? answer :"),
    ),
    "well_made": (
        *prompts(
            YES_NO,
            "{sentence} is this sentence right ? answer :",
            "question : is this a good sentence ? {sentence} answer :",
        ),
        *prompts(TRUE_FALSE, "this is a good sentence : {sentence} true or false ? answer :"),
    ),
    "asking": prompts(
        "question",
        "{passage} make a question about {about} :",
        "read the text and ask about {about} . {passage} question :",
        "text : {passage} what can one ask about {about} ? answer :",
    ),
    "positions": prompts(
        "answer",
        "words : {words} . which is the {which} ? answer :",
        "say the {which} word of {words} . answer :",
        "question : what is the {which} word ? words : {words} . answer :",
    ),
    "sequences": prompts(
        "answer",
        "{words} , what is next ? answer :",
        "what comes after {words} ? answer :",
        "words : {words} . say the next :",
    ),
}  # fmt: skip
