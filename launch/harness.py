"""Tasks of lm-evaluation-harness on our models (extra `peers`): its LM interface over our evaluator.

Requests that share a context become one example, whose continuations are scored behind one run of the context. Text becomes tokens as in
the harness's own backend: what a Hugging Face tokenizer.json puts around a text stays; other vocabularies put their start token first.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import lm_eval
import numpy as np
from etils import epath
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from merging import manifest
from merging.evaluate import Settings
from merging.evaluation.collect import Result
from merging.evaluation.evaluator import Evaluator
from merging.evaluation.examples import Example, Task
from merging.models import model_file
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import MeshShape

RESULTS = "harness.json"

# What the harness's own backend generates where a task doesn't say.
MAX_NEW_TOKENS = 256

GREEDY = {"until", "max_gen_toks", "do_sample", "temperature"}


class HarnessModel(TemplateLM):
    """One model as the harness wants it."""

    def __init__(
        self,
        evaluate: Callable[[Sequence[Task]], list[Result]],
        vocabulary: Any,
        *,
        max_length: int,
    ):
        """
        Args:
          evaluate: the model on tasks.
          vocabulary: a seqio vocabulary.
          max_length: the most tokens of a row.
        """
        super().__init__()
        self._evaluate, self._vocabulary, self.max_length = evaluate, vocabulary, max_length

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        start = getattr(self._vocabulary, "start_id", self._vocabulary.pad_id)
        return start if start else self.eot_token_id if self._is_hugging_face else start

    @property
    def _is_hugging_face(self) -> bool:
        return hasattr(self._vocabulary, "start_id")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if self._is_hugging_face:
            is_whole = add_special_tokens is not False
            return self._tokenizer.encode(string, add_special_tokens=is_whole).ids
        tokens = list(self._vocabulary.encode(string))
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_file(self._vocabulary.path)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests of one context together; a context that is too long loses its beginning, as in the harness."""
        together: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(f"request {number} has a continuation without a token")
            kept = tuple(context[-max(1, self.max_length + 1 - len(continuation)) :])
            together.setdefault(kept, []).append(number)
        examples = [
            Example(
                id=str(numbers[0]),
                prompt=np.array(context, np.int32),
                choices=tuple(np.array(requests[number][2], np.int32) for number in numbers),
                truth=0,
            )
            for context, numbers in together.items()
        ]
        (result,) = self._evaluate([_task("rank", examples)])
        found: list[Any] = [None] * len(requests)
        for numbers, scores, greedy in zip(
            together.values(), result.choice_scores, result.is_greedy, strict=True
        ):
            for number, score, is_greedy in zip(numbers, scores, greedy, strict=True):
                found[number] = (float(score), bool(is_greedy))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Whole texts, in windows of the most tokens that a row has; each token is counted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy; a text ends before the first of its stop strings.

        Raises ValueError for a task that samples.
        """
        together: dict[int, list[tuple[int, Example, list[str]]]] = {}
        for number, request in enumerate(requests):
            context, asked = request.args
            asked = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
            if asked["do_sample"] or asked.keys() - GREEDY:
                raise ValueError(f"generation here is greedy: a task asks for {asked}")
            most = int(asked["max_gen_toks"])
            prompt = self.tok_encode(context)[-(self.max_length - most) :]
            example = Example(
                id=str(number), prompt=np.array(prompt, np.int32), choices=(), truth=None
            )
            together.setdefault(most, []).append((number, example, asked["until"]))
        texts = [""] * len(requests)
        for most, members in together.items():
            task = _task(
                "generate",
                [example for _, example, _ in members],
                decode=self._decode,
                eos_id=self.eot_token_id,
                max_new_tokens=most,
            )
            (result,) = self._evaluate([task])
            for (number, _, until), text in zip(members, result.predictions, strict=True):
                texts[number] = postprocess_generated_text(text, until, None)
        return texts

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._is_hugging_face:
            return self._tokenizer.decode(list(tokens))
        return self._vocabulary.decode(list(tokens))


def _task(kind: Any, examples: Sequence[Example], **more: Any) -> Task:
    return Task(
        name="harness",
        prompt=kind,
        kind=kind,
        examples=examples,
        metric=lambda truths, predictions: {},
        **more,
    )


def evaluate(
    settings: Settings,
    names: Sequence[str],
    *,
    vocabulary: Any,
    include_path: str | None,
    limit: int | None,
    few_shot: int,
    echo: Callable[[str], None],
) -> dict[str, Any]:
    """The harness's results of each model on its tasks, by the models' ids; `harness.json` of the output holds them.

    Args:
      names: of tasks of the harness, or of those defined in `include_path`.
      echo: hears the harness's table of each model.
    """
    mesh = (settings.mesh or MeshShape(data=jax.device_count())).mesh()
    identity = {
        "stage": "harness",
        "models": {k: str(path) for k, path in settings.checkpoints.items()},
        "tasks": [*names],
        "limit": limit,
        "few_shot": few_shot,
        "include_path": include_path,
    }
    output = epath.Path(settings.output_dir)
    if manifest.is_done(output, identity):
        return json.loads((output / RESULTS).read_text())
    tasks = TaskManager(include_path=include_path, include_defaults=include_path is None)
    found = {}
    for model_id, path in settings.checkpoints.items():
        model = HarnessModel(
            _evaluate_of(settings, model_id, path, mesh),
            vocabulary,
            max_length=settings.row_length,
        )
        results = lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            num_fewshot=few_shot or None,
            limit=limit,
            task_manager=tasks,
            log_samples=False,
            bootstrap_iters=1_000,
        )
        echo(f"{model_id}\n{make_table(results)}")
        found[model_id] = results["results"]
    if jax.process_index() == 0:
        staging = manifest.Staging(output)
        staging.create(identity)
        (staging.folder / RESULTS).write_text(json.dumps(found, indent=1, default=str))
        staging.commit(manifest.provenance(identity))
    return found


def _evaluate_of(
    settings: Settings, model_id: str, path: epath.PathLike, mesh: Mesh
) -> Callable[[Sequence[Task]], list[Result]]:
    changes = {
        name: value
        for name, value in (("dtype", settings.dtype), ("param_dtype", settings.param_dtype))
        if value is not None
    }
    config = settings.model or model_file.describe(path, **changes).config
    params = read_params(path, config, mesh, params_path=settings.params_path)

    def run(tasks: Iterable[Task]) -> list[Result]:
        evaluator = Evaluator(
            model_of(config), list(tasks), mesh=mesh, options=settings.options(config)
        )
        return evaluator(params, model_id)

    return run
