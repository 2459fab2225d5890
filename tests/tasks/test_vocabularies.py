"""Vocabularies encode and decode alike in Python and in TensorFlow, and say where a sequence starts and ends."""

from __future__ import annotations

import json
import pathlib
from types import ModuleType

import pytest


@pytest.fixture
def vocabularies(seqio_module: ModuleType) -> ModuleType:
    from tasks import vocabularies

    return vocabularies


@pytest.fixture
def tokenizer_json(tmp_path: pathlib.Path) -> pathlib.Path:
    """A byte-level tokenizer of some merges, as Hugging Face stores it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["yes no yes no the answer is yes"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    return tmp_path / "tokenizer.json"


def test_words(vocabularies: ModuleType):
    words = vocabularies.WordVocabulary(["the", "cat", "isn't", ".", "?", "The"])
    text = "The cat isn't the cat."
    assert words.encode(text) == [8, 4, 5, 3, 4, 6]
    assert words.decode([*words.encode(text), 1, 4]) == text
    assert words.encode("the dog") == [3, 2]
    assert words.decode([3, 2]) == "the <unk>"
    assert (words.vocab_size, words.eos_id, words.pad_id) == (9, 1, 0)
    assert words.encode_tf(text).numpy().tolist() == words.encode(text)
    assert words.decode_tf(words.encode_tf(text)).numpy().decode() == text
    assert words == vocabularies.WordVocabulary(words.words)
    assert words != vocabularies.WordVocabulary(["the"])
    with pytest.raises(ValueError, match="a word stands twice"):
        vocabularies.WordVocabulary(["a", "a"])
    with pytest.raises(ValueError, match="'a cat' is not one word or one mark"):
        vocabularies.WordVocabulary(["a cat"])


def test_hugging_face(vocabularies: ModuleType, tokenizer_json: pathlib.Path):
    vocabulary = vocabularies.load(str(tokenizer_json))
    features = vocabularies.features(vocabulary)
    targets = features["targets"].vocabulary
    assert vocabulary.decode(vocabulary.encode("yes</s> no")) == "yes</s> no", (
        "no special token from text"
    )
    assert targets.encode("yes") == vocabulary.encode(" yes") != vocabulary.encode("yes")
    assert targets.decode(targets.encode("yes")) == "yes"
    assert targets.encode("") == []
    assert targets.encode_tf("yes no").numpy().tolist() == targets.encode("yes no")
    assert targets.decode_tf(targets.encode_tf("yes no")).numpy().decode() == "yes no"
    assert (vocabulary.eos_id, vocabularies.start_id(vocabulary)) == (1, 0)
    assert not features["inputs"].add_eos and features["targets"].add_eos
    assert vocabulary != targets


def test_the_ends_of_hugging_face(vocabularies: ModuleType, tokenizer_json: pathlib.Path):
    tokenizer_json.with_name("config.json").write_text(
        '{"bos_token_id": 2, "eos_token_id": [1, 5]}'
    )
    assert vocabularies.start_id(vocabularies.load(str(tokenizer_json))) == 2
    tokenizer_json.with_name("tokenizer_config.json").unlink()
    assert vocabularies.load(str(tokenizer_json)).eos_id == 1
    tokenizer_json.with_name("config.json").unlink()
    with pytest.raises(
        ValueError, match="names an end of sequence that it knows|neither tokenizer_config"
    ):
        _ = vocabularies.load(str(tokenizer_json)).eos_id


def test_sentencepiece_and_bytes(vocabularies: ModuleType, seqio_module: ModuleType):
    model = (
        pathlib.Path(seqio_module.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    )
    pieces = vocabularies.load(str(model))
    assert pieces.decode(pieces.encode("this is a test")) == "this is a test"
    assert vocabularies.load("bytes").encode("ab") == [100, 101]
    digests = {vocabularies.digest(each) for each in (pieces, vocabularies.load("bytes"))}
    assert len(digests) == 2
    assert vocabularies.digest(vocabularies.load(str(model))) in digests


@pytest.mark.parametrize(
    ("spec", "message"),
    [("words", "give 'bytes', or the path"), ("/no/x.json", "there is no such file")],
)
def test_errors(vocabularies: ModuleType, spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        vocabularies.load(spec)


@pytest.mark.real
def test_real_tokenizers(vocabularies: ModuleType, real_checkpoints: pathlib.Path):
    for folder in sorted(real_checkpoints.iterdir()):
        vocabulary = vocabularies.load(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        assert vocabulary.eos_id == config["eos_token_id"]
        assert vocabularies.start_id(vocabulary) == config["bos_token_id"]
        text = "Which is right?\n- Ice is cold.\n- Fire is cold."
        assert vocabulary.decode(vocabulary.encode(text)) == text
