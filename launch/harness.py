"""Tasks of lm-evaluation-harness on our models (extra `peers`): its LM interface over our evaluator.

Requests that share a context become one example, whose continuations are scored behind one run of the context. Text becomes tokens as in
the harness's own backend: what a Hugging Face tokenizer.json puts around a text stays; other vocabularies put their start token first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lm_eval
import numpy as np
from etils import epath
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from merging import manifest
from merging.engine import hosts
from merging.evaluate import Settings, described_models
from merging.evaluation.collect import Result
from merging.evaluation.evaluator import Evaluator
from merging.evaluation.examples import Example, Task
from merging.models.config import DecoderConfig
from merging.models.families import model_of
from merging.models.parameters import read_params
from merging.partitioning import mesh_of

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
        self.cut_contexts = 0  # of all requests

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
            kept = self._end_of(context, max(1, self.max_length + 1 - len(continuation)))
            together.setdefault(tuple(kept), []).append(number)
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
            if most >= self.max_length:
                raise ValueError(
                    f"a task generates {most:,} tokens (max_gen_toks), which leaves no room for a context in"
                    f" {self.max_length:,}: lower it, or raise ROW_LENGTH where the model has learnt such positions"
                )
            prompt = self._end_of(self.tok_encode(context), self.max_length - most)
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

    def _end_of(self, context: Sequence[int], room: int) -> Sequence[int]:
        """As much of a context as there is room for, at least one token; one that loses its beginning is counted."""
        self.cut_contexts += len(context) > room
        return context[-room:]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Which tasks of the harness.

    Attributes:
      names: of tasks of the harness, or of those defined in `include_path`.
      include_path: a folder of definitions; the harness's own are then not known.
      limit: examples of each, the first; None: all.
      few_shot: training examples before each; 0: as many as the task says.
      seed: of these, and of whatever else the harness draws.
    """

    names: Sequence[str]
    include_path: str | None = None
    limit: int | None = None
    few_shot: int = 0
    seed: int = 0

    def tasks(self) -> TaskManager:
        """What is known by name. Raises ValueError for names that aren't."""
        known = TaskManager(
            include_path=self.include_path, include_defaults=self.include_path is None
        )
        unknown = [name for name in self.names if not known.match_tasks([name])]
        if unknown:
            where = "lm-evaluation-harness" if self.include_path is None else self.include_path
            raise ValueError(f"{where} has no task {', '.join(unknown)}")
        return known

    def identity(self) -> dict[str, Any]:
        """JSON that says all that the tasks depend on, but for the data sets that they name."""
        definitions = {}
        if self.include_path is not None:
            folder = pathlib.Path(self.include_path)  # the harness reads local ones only
            definitions = {
                str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.rglob("*"))
                if path.suffix in (".yaml", ".py")
            }
        return {
            "names": list(self.names),
            "limit": self.limit,
            "few_shot": self.few_shot,
            "seed": self.seed,
            "definitions": definitions,
            "lm_eval": importlib.metadata.version("lm_eval"),
        }


def evaluate(
    settings: Settings,
    asked: Asked,
    *,
    vocabulary: Any,
    vocabulary_digest: str,
    config_text: str = "",
    is_dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """The harness's results of each model on its tasks, by the models' ids; `harness.json` of the output holds them.

    Args:
      vocabulary: a seqio vocabulary, and its digest.
      config_text: goes into the manifest.
      is_dry_run: looks at models and tasks, and returns None.
      echo: hears the harness's table of each model.

    Raises ValueError or CheckpointError for models and tasks that can't be evaluated.
    """
    configs, models = described_models(settings)
    tasks = asked.tasks()
    identity = {
        "stage": "harness",
        **models,
        "tasks": asked.identity(),
        "vocabulary": vocabulary_digest,
    }
    output = epath.Path(settings.output_dir)
    if manifest.is_done(output, identity):
        echo(f"Nothing to do: {output} holds these results already.")
        return json.loads((output / RESULTS).read_text())
    if is_dry_run:
        return None
    mesh = mesh_of(settings.mesh)
    found, cut = {}, {}
    for model_id, config in configs.items():
        model = HarnessModel(
            _evaluate_of(settings, model_id, config, mesh),
            vocabulary,
            max_length=settings.options(config).row_length,
        )
        results = lm_eval.simple_evaluate(
            model,
            tasks=list(asked.names),
            num_fewshot=asked.few_shot or None,
            limit=asked.limit,
            task_manager=tasks,
            log_samples=False,
            bootstrap_iters=1_000,
            random_seed=asked.seed,
            numpy_random_seed=asked.seed,
            torch_random_seed=asked.seed,
            fewshot_random_seed=asked.seed,
        )
        echo(f"{model_id}\n{make_table(results)}")
        cut[model_id] = model.cut_contexts
        if model.cut_contexts:
            echo(
                f"{model.cut_contexts:,} contexts were longer than the row ({model.max_length:,} tokens): their beginning was cut"
            )
        found[model_id] = results["results"]
    if hosts.is_main():
        staging = manifest.Staging(output)
        staging.create(identity)
        (staging.folder / RESULTS).write_text(json.dumps(found, indent=1, default=str))
        staging.commit(manifest.provenance(identity) | {"config": config_text, "cut_contexts": cut})
    hosts.wait_for_all("committed")
    return found


def _evaluate_of(
    settings: Settings, model_id: str, config: DecoderConfig, mesh: Mesh
) -> Callable[[Sequence[Task]], list[Result]]:
    path = settings.checkpoints[model_id]
    params = read_params(path, config, mesh, params_path=settings.params_path)

    def run(tasks: Iterable[Task]) -> list[Result]:
        evaluator = Evaluator(
            model_of(config), list(tasks), mesh=mesh, options=settings.options(config)
        )
        return evaluator(params, model_id)

    return run
