"""Vocabularies, all as seqio's: SentencePiece, bytes, a Hugging Face tokenizer.json, and whole words.

`load` takes what a user writes: "bytes", a path that ends with .model (SentencePiece) or .json (Hugging Face). Token 0
is padding in seqio whatever a tokenizer calls it; our own batches know padding by segment 0, so a real token 0 does no
harm there.

A decoder reads inputs and targets as one text. SentencePiece models put a space before each of the two by themselves; a
Hugging Face tokenizer doesn't, so its targets begin with one (`prefix`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import seqio
import tensorflow as tf

if TYPE_CHECKING:
    import tokenizers

BYTES = "bytes"

# A word, with an apostrophe in it or not, or one mark.
TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
NO_SPACE_BEFORE = frozenset(".,:;?!)'")


def load(spec: str) -> seqio.Vocabulary:
    """The vocabulary that a user names.

    Raises:
      ValueError: for a name of no known kind, or a file that is not there.
    """
    if spec == BYTES:
        return seqio.ByteVocabulary()
    if not spec.endswith((".model", ".json")):
        raise ValueError(
            f"vocabulary {spec!r}: give {BYTES!r}, or the path of a .model (SentencePiece) or a .json (Hugging Face)"
        )
    if not tf.io.gfile.exists(spec):
        raise ValueError(f"vocabulary {spec!r}: there is no such file")
    return (
        seqio.SentencePieceVocabulary(spec)
        if spec.endswith(".model")
        else HuggingFaceVocabulary(spec)
    )


def features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """The features of every task: inputs without, targets with an end of sequence."""
    targets = vocabulary
    if isinstance(vocabulary, HuggingFaceVocabulary):
        targets = HuggingFaceVocabulary(vocabulary.path, prefix=" ")
    return {
        # An empty input is an example too, so inputs are not required to hold a token.
        "inputs": seqio.Feature(vocabulary, add_eos=False),
        "targets": seqio.Feature(targets, add_eos=True),
    }


def start_id(vocabulary: seqio.Vocabulary) -> int:
    """The token that a sequence starts with: the one its tokenizer always puts first, or 0, T5X's."""
    return (
        vocabulary.start_id if isinstance(vocabulary, HuggingFaceVocabulary) else vocabulary.pad_id
    )


def digest(vocabulary: seqio.Vocabulary) -> str:
    """Changes with whatever changes the tokens of a text."""
    described = (
        f"{type(vocabulary).__name__} {vocabulary} {vocabulary.vocab_size} {vocabulary.eos_id}"
    )
    return hashlib.sha256(described.encode()).hexdigest()


class WordVocabulary(seqio.Vocabulary):
    """Whole words and single marks: 0 is padding, 1 the end of sequence, 2 any word not among them.

    Case counts, white space does not: decoding puts one space between words, and none before a mark. A text whose words
    are all known, so spaced, comes back as it was.

    Args:
      words: all known words and marks, each once, in the order of their ids from 3.
    """

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__()
        self.words = tuple(words)
        self._ids = {word: 3 + i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("a word stands twice among the words of a vocabulary")
        for word in self.words:
            if TOKEN.findall(word) != [word]:
                raise ValueError(f"{word!r} is not one word or one mark")

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return 3 + len(self.words)

    def _encode(self, s: str) -> list[int]:
        return [self._ids.get(word, self.unk_id) for word in TOKEN.findall(s)]

    def _decode(self, ids: Sequence[int]) -> str:
        text = ""
        for id_ in ids:
            if id_ >= 2:
                word = self.words[id_ - 3] if id_ > 2 else "<unk>"
                text += word if not text or word in NO_SPACE_BEFORE else f" {word}"
        return text

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return _encode_in_python(self, s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return _decode_in_python(self, ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __str__(self) -> str:
        named = hashlib.sha256("\n".join(self.words).encode()).hexdigest()
        return f"WordVocabulary({len(self.words)} words, sha256={named[:16]})"


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A tokenizer.json as a seqio vocabulary, by the `tokenizers` library.

    Special tokens are never made from text. `start_id` is the token that the tokenizer always puts first (as Gemma's
    does), or else the bos_token_id of config.json, or else 0.

    Args:
      path: of tokenizer.json; tokenizer_config.json or config.json beside it tells the end of sequence.
      prefix: text put before what is encoded and taken from what is decoded.
    """

    def __init__(self, path: str, *, prefix: str = "") -> None:
        super().__init__()
        self.path, self.prefix = str(path), prefix

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self._text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as the letters that they are written with
        return tokenizer

    @functools.cached_property
    def _text(self) -> str:
        return pathlib.Path(self.path).read_text(encoding="utf-8")

    @functools.cached_property
    def eos_id(self) -> int:
        token = self._beside("tokenizer_config.json").get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(name) if name else self._configured("eos_token_id")
        if found is None:
            raise ValueError(
                f"{self.path}: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) beside it"
                " names an end of sequence that it knows"
            )
        return found

    @property
    def unk_id(self) -> None:
        return None

    @functools.cached_property
    def start_id(self) -> int:
        first = next(iter(self._tokenizer.encode("").ids), self._configured("bos_token_id"))
        return self.pad_id if first is None else first

    def _configured(self, name: str) -> int | None:
        """A token of config.json; the first of several."""
        found = self._beside("config.json").get(name)
        return found[0] if isinstance(found, list) else found

    def _beside(self, name: str) -> dict[str, Any]:
        file = pathlib.Path(self.path).with_name(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @functools.cached_property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(self.prefix + s, add_special_tokens=False).ids if s else []

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids]).removeprefix(self.prefix)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return _encode_in_python(self, s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return _decode_in_python(self, ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    @functools.cached_property
    def _named(self) -> str:
        sha256 = hashlib.sha256(self._text.encode()).hexdigest()
        return f"HuggingFaceVocabulary(sha256={sha256[:16]}, prefix={self.prefix!r})"

    def __str__(self) -> str:
        return self._named


def _encode_in_python(vocabulary: seqio.Vocabulary, s: tf.Tensor) -> tf.Tensor:
    def encode(text: bytes | np.ndarray) -> np.ndarray:
        text = np.asarray(text, object).item()  # bytes within tf.data, an array of them outside
        return np.asarray(vocabulary.encode(text.decode("utf-8")), np.int32)

    tokens = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32, stateful=False)
    tokens.set_shape([None])
    return tokens


def _decode_in_python(vocabulary: seqio.Vocabulary, ids: tf.Tensor) -> tf.Tensor:
    def decode(tokens: Sequence[int]) -> bytes:
        return vocabulary.decode([int(i) for i in tokens]).encode("utf-8")

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    text.set_shape([])
    return text
