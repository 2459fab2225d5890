"""The first pass: facts of the whole model that TIES and DARE ask for, exact, by counting.

A sample proposes a narrow bracket of magnitudes for each threshold; one read of everything then counts what lies above
and in the brackets, which proves each threshold exactly, or says in which direction to look again. The same read counts
the votes: the majority sign is proven by it wherever the majority exceeds what the uncertain votes could change, else
one more read counts them under the exact thresholds. Every extra read is told through `log`.

Only counts are added up, so the facts are the same whatever the slices, the order and the number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from merging.engine.packed import (
    IN_A_WORD,
    count,
    counted_bit,
    found_bit,
    has_alarm,
    with_any_found,
)
from merging.engine.pieces import Piece, Tensor, piece_at, pieces_of
from merging.engine.selection import Asked
from merging.engine.step import Facts, Question, codes_step, in_worker, survey_step
from merging.engine.stream import LoadedPiece, Stream, padded_size, take, to_float32
from merging.kernels.magnitude import (
    Bracket,
    Search,
    answer_from_all,
    code_of,
    code_to_magnitude,
    propose_from_sample,
)
from merging.methods.method import TaskVectorMethod, each_density
from merging.methods.task_arithmetic import TaskArithmetic

SAMPLE_ELEMENTS = (
    1 << 20
)  # per expert: brackets of about 0.5 % of the entries; sorting it takes 10 ms an expert
SAMPLE_BLOCK = (
    1 << 12
)  # elements read in one go; smaller blocks are more alike the whole, larger ones fewer reads
FEWEST_BLOCKS = 64  # of a part of the model that is trimmed by itself
survey_in_worker = in_worker(survey_step, "geometry")
codes_in_worker = in_worker(codes_step)

MODEL = ""  # the group of a trim over the whole model; other groups are tensor paths

Combine = Callable[[np.ndarray], np.ndarray]  # int64 array -> its sum over all hosts


class MethodSurvey:
    """What is known so far for one method.

    Attributes:
      method: its scale does not matter.
      paths: of the tensors it asks about.
      searches: per group (the model, or each tensor) one search per expert; empty without a trim.
      l1: per tensor path, float32 [N] ratios.
      majority: +1, -1, or None while unknown.
    """

    def __init__(self, method: TaskVectorMethod, tensors: Sequence[Tensor], experts: int):
        self.method = method
        self.paths = frozenset(tensor.path for tensor in tensors)
        self.experts = experts
        self.l1: dict[str, np.ndarray] = {}
        self.majority: int | None = None
        self.searches: dict[str, list[Search]] = {}
        self._known: dict[
            tuple[str, str], Any
        ] = {}  # questions, brackets and facts, until counts change them
        if method.trim_fraction is not None:
            sizes: dict[str, int] = {}
            for tensor in tensors:
                group = self.group(tensor)
                sizes[group] = sizes.get(group, 0) + tensor.size
            for group, size in sizes.items():
                self.searches[group] = [
                    Search(int(density * size), size)
                    for density in each_density(method.trim_fraction, experts)
                ]

    def group(self, tensor: Tensor) -> str:
        return MODEL if self.method.trim_scope == "model" else tensor.path

    def covers(self, tensor: Tensor) -> bool:
        """Whether this tensor is one of those it asks about."""
        return tensor.path in self.paths

    @property
    def lacks_majority(self) -> bool:
        """Whether votes have still to be counted."""
        return self.method.asks_majority and self.majority is None

    def is_open(self, tensor: Tensor) -> bool:
        """Whether this tensor still has to be counted for a threshold."""
        return (
            self.covers(tensor)
            and bool(self.searches)
            and not all(search.is_done for search in self.searches[self.group(tensor)])
        )

    def forget(self) -> None:
        """To be called when counts have changed what is known."""
        self._known.clear()

    def question(self, tensor: Tensor) -> Question:
        """What to count in this tensor next."""
        edges = None
        if self.searches:
            edges = self._remember(
                "edges",
                tensor,
                lambda searches: np.array([_edges(s) for s in searches], np.float32),
            )
        return Question(self.method, Facts(l1=self.l1.get(tensor.path)), edges)

    def brackets(self, tensor: Tensor) -> Brackets:
        """The brackets that `question` asks for."""
        return self._remember("brackets", tensor, Brackets.of)

    def facts(self, tensor: Tensor) -> Facts:
        """What the merge of this tensor needs, once everything is known."""
        thresholds = None
        if self.searches:
            thresholds = self._remember(
                "thresholds", tensor, lambda searches: np.array([s.threshold for s in searches])
            )
        return Facts(
            thresholds=thresholds,
            majority=None if self.majority is None else np.float32(self.majority),
            l1=self.l1.get(tensor.path),
        )

    def known(self) -> dict[str, Any]:
        """All that was found out, as JSON: what `restore` takes, bit for bit."""
        return {
            "method": repr(self.method),
            "majority": self.majority,
            "l1": {path: row.tolist() for path, row in self.l1.items()},
            "searches": {
                group: [(s.low, s.high, s.at_least_low) for s in searches]
                for group, searches in self.searches.items()
                if all(s.is_done for s in searches)
            },
        }

    def restore(self, known: Mapping[str, Any]) -> None:
        """Takes what an earlier run found out about the same tensors of the same inputs."""
        assert known["method"] == repr(self.method)
        self.majority = known["majority"]
        self.l1 = {path: np.array(row, np.float32) for path, row in known["l1"].items()}
        for group, answers in known["searches"].items():
            for search, answer in zip(self.searches[group], answers, strict=True):
                search.low, search.high, search.at_least_low = answer
        self.forget()

    def _remember(self, what: str, tensor: Tensor, compute: Callable[[list[Search]], Any]) -> Any:
        """What follows from the tensor's searches; computed anew for every piece it would cost more than the piece."""
        key = what, self.group(tensor)
        if key not in self._known:
            self._known[key] = compute(self.searches[key[1]])
        return self._known[key]


@dataclasses.dataclass(frozen=True)
class Brackets:
    """The brackets of all searches that are not done, and their bins, those of one expert behind those of another.

    Attributes:
      low, shift: int64 [N], as in `Bracket`.
      first: int64 [N + 1], where each expert's bins begin, and where all end; those that are done have none.
    """

    low: np.ndarray
    shift: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, searches: Sequence[Search]) -> Brackets:
        brackets = [Bracket(0, 0, 0, 0) if s.is_done else s.bracket() for s in searches]
        return cls(
            low=np.array([b.low for b in brackets], np.int64),
            shift=np.array([b.shift for b in brackets], np.int64),
            first=np.cumsum([0, *(b.bins for b in brackets)]),
        )


def _edges(search: Search) -> tuple[np.float32, np.float32, np.float32]:
    """Magnitudes low, high, guess of a search's bracket; all at the threshold where it is done."""
    if search.is_done:
        return (search.threshold,) * 3
    bracket = search.bracket()
    low, high, guess = (
        code_to_magnitude(code) for code in (bracket.low, bracket.high, bracket.guess)
    )
    return low, high, guess


@dataclasses.dataclass
class Votes:
    """Counts of elements by the sign of their vote; the certain ones have no expert in its bracket."""

    positive: int = 0
    negative: int = 0
    certain_positive: int = 0
    certain_negative: int = 0
    uncertain: int = 0

    def majority(self, *, guess_was_exact: bool) -> int | None:
        """The sign of the majority, or None if the counts do not prove it. A majority of zero acts as negative."""
        if guess_was_exact:
            return 1 if self.positive > self.negative else -1
        margin = self.certain_positive - self.certain_negative
        if abs(margin) > self.uncertain:
            return 1 if margin > 0 else -1
        return None


def survey(
    questions: Sequence[Asked],
    stream: Stream,
    tensors: Sequence[Tensor],
    mine: Sequence[Tensor],
    *,
    combine: Combine,
    log: Callable[[str], None],
) -> tuple[list[MethodSurvey], int]:
    """Finds everything that is asked.

    Args:
      questions: methods, each with the tensors that are its model, the same on every host.
      stream: reads the inputs.
      tensors: all merged tensors of the model, the same on every host.
      mine: those that this host reads (and later merges).
      combine: adds an array of counts over all hosts.
      log: told of every read and why.

    Returns:
      One survey per question, in their order (thresholds of single tensors are known for `mine` alone), and how often all
      inputs were read.
    """
    surveys = [MethodSurvey(q.method, q.tensors, len(stream.experts)) for q in questions]
    asking_l1 = [s for s in surveys if s.method.asks_l1]
    if asking_l1:
        log("reading all inputs for the L1 norms of each tensor")
        _survey_l1(asking_l1, stream, tensors, mine, combine)
    _propose([s for s in surveys if s.searches], stream, tensors, mine)
    reads = int(bool(asking_l1))
    first = True
    while True:
        is_open = [any(s.is_open(tensor) for tensor in mine) for s in surveys]
        is_open = combine(np.array(is_open, np.int64)) > 0
        is_unknown = [s.lacks_majority for s in surveys]
        asking = [s for s, o, u in zip(surveys, is_open, is_unknown, strict=True) if o or u]
        if not asking:
            return surveys, reads
        if first:
            log("reading all inputs for " + _what(asking))
        elif any(is_open):
            log("reading again: the sample's bracket did not hold every threshold")
        else:
            log(
                "reading again: before the thresholds were exact, the majority sign was too close to call"
            )
        first = False
        reads += 1
        wanted = [
            t
            for t in mine
            if any(s.is_open(t) or (s.covers(t) and s.lacks_majority) for s in asking)
        ]
        _survey_counts(asking, stream, wanted, combine)


def _what(surveys: Sequence[MethodSurvey]) -> str:
    trims = any(s.searches for s in surveys)
    votes = any(s.method.asks_majority for s in surveys)
    return " and ".join(["exact thresholds"] * trims + ["the majority sign"] * votes)


# ---- one read that counts -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Tally:
    """Counts of one method's brackets in one group.

    Attributes:
      above: int64 [N].
      bins: int64, of all `brackets` one after another.
    """

    above: np.ndarray
    bins: np.ndarray
    brackets: Brackets


@dataclasses.dataclass
class _Counted:
    """What one piece adds for one method.

    Attributes:
      above: int64 [N]; None without a trim.
      bins: int64, of every entry that lies in a bracket the number of its bin among those of all experts.
      votes: int64 [5], in the order of `Votes`.
    """

    above: np.ndarray | None
    bins: np.ndarray
    votes: np.ndarray


def _survey_counts(
    surveys: Sequence[MethodSurvey], stream: Stream, tensors: Sequence[Tensor], combine: Combine
) -> None:
    """Reads the tensors once and narrows every open search; decides the majorities that the counts prove."""
    tallies: dict[tuple[int, str], _Tally] = {}
    votes = np.zeros((len(surveys), 5), np.int64)
    guesses = [_answers(s, tensors) for s in surveys]
    left = {tensor.path: tensor.size for tensor in tensors}  # elements not yet counted

    def take(result: tuple[Piece, dict[int, _Counted]]) -> None:
        piece, counted = result
        for number, found in counted.items():
            survey = surveys[number]
            votes[number] += found.votes
            if found.above is None:
                continue
            key = number, survey.group(piece.tensor)
            if key not in tallies:
                tallies[key] = _empty_tally(survey, key[1])
            tally = tallies[key]
            tally.above += found.above
            np.add.at(tally.bins, found.bins, 1)
        path = piece.tensor.path
        left[path] -= piece.size
        if not left[path]:
            _narrow(surveys, tallies, path)

    stream.run(
        stream.pieces(tensors),
        lambda piece: (piece, _count(surveys, stream, stream.load(piece))),
        take,
    )
    for number, survey in enumerate(surveys):
        if MODEL in survey.searches:
            tally = tallies.setdefault((number, MODEL), _empty_tally(survey, MODEL))
            total = combine(np.concatenate([tally.above, tally.bins]))
            tally.above, tally.bins = np.split(total, [len(tally.above)])
    _narrow(surveys, tallies, MODEL)
    # A host whose guesses were not all exact makes the votes of all uncertain.
    inexact = [
        sum(a != b for a, b in zip(guess, _answers(s, tensors), strict=True))
        for s, guess in zip(surveys, guesses, strict=True)
    ]
    votes, inexact = combine(votes), combine(np.array(inexact, np.int64))
    for survey, counts, wrong in zip(surveys, votes, inexact, strict=True):
        if survey.lacks_majority:
            survey.majority = Votes(*map(int, counts)).majority(guess_was_exact=bool(wrong == 0))


def _narrow(
    surveys: Sequence[MethodSurvey], tallies: dict[tuple[int, str], _Tally], group: str
) -> None:
    """Hands complete counts of a group to its searches and forgets them."""
    for number, survey in enumerate(surveys):
        tally = tallies.pop((number, group), None)
        if tally is None:
            continue
        of_experts = np.split(tally.bins, tally.brackets.first[1:-1])
        for search, above, bins in zip(
            survey.searches[group], tally.above, of_experts, strict=True
        ):
            if not search.is_done:
                search.narrow_by_bins(search.bracket(), int(above), bins)
        survey.forget()


def _empty_tally(survey: MethodSurvey, group: str) -> _Tally:
    brackets = Brackets.of(survey.searches[group])
    return _Tally(
        np.zeros(survey.experts, np.int64), np.zeros(brackets.first[-1], np.int64), brackets
    )


def _answers(survey: MethodSurvey, tensors: Sequence[Tensor]) -> list[int]:
    """The answer of each search as far as it is known: exact where done, else the guess."""
    groups = dict.fromkeys(survey.group(t) for t in tensors if survey.covers(t))
    groups = groups if survey.searches else {}
    return [
        (search.low if search.rank else -1) if search.is_done else search.bracket().guess
        for group in groups
        for search in survey.searches[group]
    ]


def _count(
    surveys: Sequence[MethodSurvey], stream: Stream, loaded: LoadedPiece
) -> dict[int, _Counted]:
    """Counts one piece for every survey that covers it, by the survey's number; runs in a worker."""
    covering = [i for i, s in enumerate(surveys) if s.covers(loaded.tensor)]
    questions = tuple(surveys[i].question(loaded.tensor) for i in covering)
    base, experts = loaded.on_devices()
    packed = survey_in_worker(
        questions, base, experts, loaded.keys, loaded.offset, geometry=loaded.geometry
    )
    counted = {}
    for number, question, words in zip(covering, questions, packed, strict=True):
        words = [np.asarray(word)[: loaded.size] for word in words]
        if has_alarm(words):
            stream.blame_not_finite(loaded)
        counted[number] = _count_words(surveys[number], question, words, loaded)
    return counted


def _count_words(
    survey: MethodSurvey, question: Question, words: list[np.ndarray], loaded: LoadedPiece
) -> _Counted:
    if question.edges is None:  # every vote is certain
        positive, negative = count(words, 2)
        votes = np.array([positive, negative, positive, negative, 0], np.int64)
        return _Counted(None, np.zeros(0, np.int64), votes)
    number = len(loaded.experts)
    *above, positive, negative = count(words, number + 2)
    chosen = with_any_found(words)
    flags = [word[chosen] for word in words]
    uncertain = [
        np.count_nonzero(flags[i // IN_A_WORD] & counted_bit(i)) for i in (number, number + 1)
    ]
    votes = [positive, negative, positive - uncertain[0], negative - uncertain[1], len(chosen)]
    return _Counted(
        np.array(above, np.int64),
        _bins_inside(survey, question, flags, chosen, loaded),
        np.array(votes, np.int64),
    )


def _bins_inside(
    survey: MethodSurvey,
    question: Question,
    flags: list[np.ndarray],
    chosen: np.ndarray,
    loaded: LoadedPiece,
) -> np.ndarray:
    """Every entry of `chosen` elements that lies in its expert's bracket: the number of its bin, from its magnitude."""
    brackets = survey.brackets(loaded.tensor)
    inside = [
        np.flatnonzero((flags[i // IN_A_WORD] & found_bit(i)) != 0) for i in range(survey.experts)
    ]
    # Only what survived a drop can lie in a bracket that excludes zero: there the vector is the plain one.
    if question.facts.l1 is None and np.all(brackets.low[np.diff(brackets.first) > 0] > 0):
        codes = _plain_codes(loaded, chosen, inside)
    else:
        every = gathered_codes(question, loaded, chosen)
        codes = [row[at] for row, at in zip(every, inside, strict=True)]
    parts = zip(codes, brackets.low, brackets.shift, brackets.first, strict=False)
    return np.concatenate(
        [first + ((code.astype(np.int64) - low) >> shift) for code, low, shift, first in parts]
    )


def _plain_codes(
    loaded: LoadedPiece, chosen: np.ndarray, inside: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Magnitude codes of entries of each expert's plain task vector, as XLA computes them: int64 [len(inside[i])].

    Args:
      chosen: elements of the piece. inside: for each expert, which of them.
    """
    base = _flushed(take(loaded.base, chosen))
    codes = []
    for expert, at in zip(loaded.experts, inside, strict=True):
        ours = _flushed(take(expert, chosen[at]))
        codes.append(code_of(ours - base[at]))
    return codes


def _flushed(array: np.ndarray) -> np.ndarray:
    """In float32, with subnormal numbers as zero, as XLA:CPU reads them."""
    array = to_float32(array)
    array[np.abs(array) < np.finfo(np.float32).tiny] = 0
    return array


def gathered_codes(question: Question, loaded: LoadedPiece, chosen: np.ndarray) -> np.ndarray:
    """Magnitude codes of chosen elements of a piece: uint32 [N, chosen]."""
    index = np.zeros(padded_size(len(chosen)), np.int64)
    index[: len(chosen)] = chosen
    flat = (loaded.piece.start + index).astype(np.uint64)
    codes = codes_in_worker(
        question,
        take(loaded.base, index),
        tuple(take(expert, index) for expert in loaded.experts),
        loaded.keys,
        flat.astype(np.uint32),
        (flat >> np.uint64(32)).astype(np.uint32) if loaded.geometry.wide else None,
    )
    return np.asarray(codes)[:, : len(chosen)]


# ---- the sample -----------------------------------------------------------------------------------------------------


def _propose(
    surveys: Sequence[MethodSurvey],
    stream: Stream,
    tensors: Sequence[Tensor],
    mine: Sequence[Tensor],
) -> None:
    """Samples the inputs and proposes a bracket to every search. Every host samples the whole model alike."""
    total = sum(tensor.size for tensor in tensors)
    together: dict[tuple[str, frozenset[str]], list[MethodSurvey]] = {}
    for each in surveys:
        together.setdefault((each.method.trim_scope, each.paths), []).append(each)
    for (scope, paths), asking in together.items():
        sampled = [t for t in (tensors if scope == "model" else mine) if t.path in paths]
        codes: dict[tuple[int, str, int], list[np.ndarray]] = {}
        for piece in _sample_pieces(sampled, total, whole_model=scope == "model"):
            loaded = stream.load(piece, is_sample=True)
            every = np.arange(loaded.size)
            for number, survey in enumerate(asking):
                if type(survey.method).vectors is TaskVectorMethod.vectors:
                    found = _plain_codes(loaded, every, [every] * survey.experts)
                else:
                    found = gathered_codes(survey.question(piece.tensor), loaded, every)
                for i, row in enumerate(found):
                    key = (number, survey.group(piece.tensor), i)
                    codes.setdefault(key, []).append(row)
        for (number, group, i), blocks in codes.items():
            survey = asking[number]
            search = survey.searches[group][i]
            if sum(map(len, blocks)) == search.size:
                search.propose(*answer_from_all(blocks, search.rank))
            else:
                density = each_density(survey.method.trim_fraction, survey.experts)[i]
                search.propose(*propose_from_sample(blocks, density))
            survey.forget()


def _sample_pieces(tensors: Sequence[Tensor], total: int, *, whole_model: bool) -> Iterator[Piece]:
    """Blocks of elements spread evenly over the tensors taken together, or over each; all of what is small.

    `total` is the size of the whole model, of which these may be a part.
    """
    model_stride = total * SAMPLE_BLOCK // SAMPLE_ELEMENTS
    if whole_model:
        model_stride = min(model_stride, sum(t.size for t in tensors) // FEWEST_BLOCKS)
    position = 0  # of the next block, in elements from the tensor's start
    for tensor in tensors:
        stride = model_stride if whole_model else min(model_stride, tensor.size // 16)
        if stride <= SAMPLE_BLOCK:
            yield from pieces_of(tensor, SAMPLE_BLOCK)
            continue
        position = position if whole_model else 0
        while position < tensor.size:
            yield piece_at(tensor, position, SAMPLE_BLOCK)
            position += stride
        position -= tensor.size


# ---- L1 norms -------------------------------------------------------------------------------------------------------


def _survey_l1(
    surveys: Sequence[MethodSurvey],
    stream: Stream,
    tensors: Sequence[Tensor],
    mine: Sequence[Tensor],
    combine: Combine,
) -> None:
    """L1 norms of every task vector before and after the drop, as exact sums, hence their ratios."""
    experts = len(stream.experts)
    number_of = {tensor.path: i for i, tensor in enumerate(tensors)}
    sums: dict[str, list[list[list[int]]]] = {}

    def work(piece: Piece) -> tuple[str, list[list[list[int]]]]:
        loaded = stream.load(piece)
        every = np.arange(loaded.size)
        covering = [s for s in surveys if s.covers(piece.tensor)]
        before = gathered_codes(Question(_PLAIN, Facts(), None), loaded, every)
        return piece.tensor.path, [
            [[exact_sum(before[i]), exact_sum(after[i])] for i in range(experts)]
            for after in (
                gathered_codes(Question(s.method, Facts(), None), loaded, every) for s in covering
            )
        ]

    def take(result: tuple[str, list[list[list[int]]]]) -> None:
        path, found = result
        total = sums.setdefault(path, [[[0, 0] for _ in range(experts)] for _ in found])
        for of_method, more in zip(total, found, strict=True):
            for pair, add in zip(of_method, more, strict=True):
                pair[0] += add[0]
                pair[1] += add[1]

    asked = [t for t in mine if any(s.covers(t) for s in surveys)]
    stream.run(stream.pieces(asked), work, take)
    ratios = np.zeros((len(surveys), len(tensors), experts), np.float32)
    for path, of_methods in sums.items():
        covering = [m for m, s in enumerate(surveys) if path in s.paths]
        for m, pairs in zip(covering, of_methods, strict=True):
            ratios[m, number_of[path]] = l1_ratios(pairs)
    ratios = combine(ratios.view(np.uint32).astype(np.int64)).astype(np.uint32).view(np.float32)
    for survey, table in zip(surveys, ratios, strict=True):
        survey.l1 = {tensor.path: row for tensor, row in zip(tensors, table, strict=True)}


_PLAIN = TaskArithmetic()  # asks for plain task vectors


def l1_ratios(pairs: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 [N]: exact norm before over exact norm after, rounded once; 0 where nothing is left."""
    ratios = [float(Fraction(before, after)) if after else 0.0 for before, after in pairs]
    return np.array(ratios, np.float32)


def exact_sum(codes: np.ndarray) -> int:
    """The sum of the magnitudes with these codes, in units of 2^-149: exact, so that its order does not matter."""
    present = codes[codes != 0].astype(np.int64) + ((1 << 23) - 1)  # bits of the float32
    exponent = present >> 23
    mantissa = (present & ((1 << 23) - 1)) | (1 << 23)
    # Below 2^29 elements a float64 bin holds the sum of its 24-bit mantissas exactly.
    by_exponent = np.bincount(exponent, weights=mantissa.astype(np.float64))
    return sum(int(m) << (e - 1) for e, m in enumerate(by_exponent) if m)
