"""Tasks of the LM Evaluation Harness (EleutherAI), which asks a model in three ways: how probable a continuation is, how
probable a text is, and what it goes on with. `TaskModel` answers; lm_eval itself is imported where tasks are run.

The conventions are those of the harness' own `hf` model, so that scores can be compared: bos before a text where the
tokenizer puts it there, and before nothing else `first_id`; spaces at the end of a context belong to the continuation;
what is too long loses its beginning. Bytes need no such care: a byte model's context and continuation are encoded
apart, and the boundary is exact. In a chat the template's special tokens are read as such; elsewhere all is text.
"""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from minalm.errors import InputError
from minalm.evaluation.bolmo_scoring import BolmoScorer
from minalm.evaluation.scoring import Request, Scorer, first_id
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.folder import NEW_BYTES, NEW_TOKENS
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization.chat_template import Render, render
from minalm.tokenization.vocabulary import Vocabulary

Ids = Int32[np.ndarray, " _"]
MAX_TOKENS = 256  # that are generated where a task does not say how many, as in the harness


@dataclass(frozen=True)
class Generation:
    """How a task wants a text to go on."""

    max_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    stop_strings: tuple[str, ...] = ()


# Continuations of prompts (the ids of each, for each model), up to what ends them; a stop string may be among them.
Generate = Callable[[Sequence[tuple[Ids, ...]], Generation], list[list[int]]]


@dataclass(eq=False)
class TaskModel:
    """What the harness asks of one model, or of an ensemble."""

    scorer: Scorer | BolmoScorer
    generate: Generate | None = None  # None: only for tasks that do not generate
    date: str = "2026-01-01"  # what chat templates take for today
    progress: Callable[[int], None] | None = None
    _chats: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what each member's template writes for a chat

    @property
    def vocabularies(self) -> list[Vocabulary]:
        return [model.vocabulary for model in self.scorer.models]

    @property
    def reads_bytes(self) -> bool:
        return self.vocabularies[0].tokenizer is None

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation), log p and whether greedy decoding would write it. Raises InputError."""
        scores = self.scorer([self._request(*pair) for pair in pairs], self.progress)
        return [(float(score.logp.sum(dtype=np.float64)), bool(score.greedy.all())) for score in scores]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of whole texts, after `first_id` alone. What is longer than the model reads is cut into windows of that
        many tokens, the last one of which overlaps with the one before it."""
        firsts = [first_id(vocabulary) for vocabulary in self.vocabularies]
        requests, owner = [], []
        for number, text in enumerate(texts):
            ids = self._ids(0, text, bos=False)
            window = self.scorer.longest or len(ids)
            for start in range(0, len(ids), window):
                stop = min(start + window, len(ids))
                before = ids[max(stop - window - 1, 0) : start]  # one token at least, but at the start
                contexts = [before] * len(firsts) if start else [np.array([first], np.int32) for first in firsts]
                requests.append(Request(tuple(contexts), ids[start:stop]))
                owner.append(number)
        totals = [0.0] * len(texts)
        for number, score in zip(owner, self.scorer(requests, self.progress), strict=True):
            totals[number] += float(score.logp.sum(dtype=np.float64))
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model goes on with after each context, as its settings want it (`until`, `max_gen_toks`, ...). A task
        counts in tokens: for a byte model, each is NEW_BYTES / NEW_TOKENS bytes. Raises InputError for a setting that
        is not known."""
        if self.generate is None:
            raise ValueError("this model was made for tasks that do not generate")
        texts: list[str] = [""] * len(requests)
        alike: dict[Generation, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            alike.setdefault(self._generation(settings), []).append(number)
        size = self.scorer.batch_size
        for generation, numbers in alike.items():
            prompts = {number: self._prompt(requests[number][0], generation) for number in numbers}
            numbers.sort(key=lambda number: -len(prompts[number][0]))
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                written = self.generate([prompts[number] for number in batch], generation)
                for number, ids in zip(batch, written, strict=True):
                    texts[number] = before_stops(self.vocabularies[0].decode(ids), generation.stop_strings)
                if self.progress is not None:
                    self.progress(len(batch))
        return texts

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """What the first model's chat template writes; what the others' write is kept for when this text is asked for.
        A template that refuses a system message gets the chat without it, as in the harness.

        Raises InputError for a model without a chat template, or a chat that the template refuses.
        """
        texts = tuple(self._rendered(each, messages, add_generation_prompt) for each in self.vocabularies)
        self._chats[texts[0]] = texts
        return texts[0]

    def _rendered(self, vocabulary: Vocabulary, messages, add_generation_prompt: bool) -> str:
        template = vocabulary.chat_template
        if template is None:
            raise InputError(f"{vocabulary.name} has no chat template: leave out --chat")
        messages = [dict(message) for message in messages]
        others = [message for message in messages if message["role"] != "system"]
        why = ""
        for each in (messages, others):
            ((text, why),) = render([Render(template, each, add_generation_prompt=add_generation_prompt)], self.date)
            if text is not None and not add_generation_prompt:  # the last message goes on: without what ends it
                content = each[-1]["content"].strip()  # as some templates write it
                text = text[: text.rfind(content) + len(content)]
            if text is not None:
                return text
        raise InputError(f"{template.file} refuses a chat of the task ({why}): leave out --chat")

    def _context(self, text: str) -> tuple[str, ...]:
        """A context as each member reads it."""
        if text in self._chats:
            return self._chats[text]
        for chat, texts in self._chats.items():  # a task may write something behind the chat
            if text.startswith(chat):
                return tuple(each + text[len(chat) :] for each in texts)
        return (text,) * len(self.vocabularies)

    def _ids(self, member: int, text: str, bos: bool = True) -> Ids:
        """The tokens of a text; in chats special tokens are found. With `bos` after the tokenizer's own bos, unless the
        text brings it."""
        vocabulary = self.vocabularies[member]
        parts = vocabulary.special_tokens.split(text) if self._chats else [text]
        segments = [
            Segment(Markup((part,), (part,)) if number % 2 else part) for number, part in enumerate(parts) if part
        ]
        if bos and vocabulary.adds_bos and not (self._chats and text.startswith(vocabulary.named("bos"))):
            segments.insert(0, Segment(Special("bos")))
        return vocabulary.encode([tuple(segments)])[0].ids

    def _request(self, context: str, continuation: str) -> Request:
        if not context:
            firsts = [np.array([first_id(vocabulary)], np.int32) for vocabulary in self.vocabularies]
            return Request(tuple(firsts), self._ids(0, continuation, bos=False))
        contexts = self._context(context)
        if self.reads_bytes:
            ids = tuple(self._ids(member, text) for member, text in enumerate(contexts))
            return Request(ids, self._ids(0, continuation, bos=False))
        spaces = context[len(context.rstrip()) :]
        contexts = [text.removesuffix(spaces) for text in contexts]
        before = [self._ids(member, text) for member, text in enumerate(contexts)]
        after = self._ids(0, contexts[0] + spaces + continuation)[len(before[0]) :]
        firsts = [np.array([first_id(vocabulary)], np.int32) for vocabulary in self.vocabularies]
        return Request(tuple(ids if len(ids) else first for ids, first in zip(before, firsts)), after)

    def _prompt(self, context: str, generation: Generation) -> tuple[Ids, ...]:
        ids = [self._ids(member, text) for member, text in enumerate(self._context(context))]
        if self.scorer.longest is not None:
            room = self.scorer.longest - generation.max_tokens
            if room < 1:
                raise InputError(
                    f"a task generates {generation.max_tokens} tokens, and the model reads {self.scorer.longest}: "
                    "use a model that reads more"
                )
            self.scorer.cut += any(len(each) > room for each in ids)
            ids = [each[-room:] for each in ids]
        return tuple(ids)

    def _generation(self, settings: Mapping[str, Any]) -> Generation:
        left = dict(settings)
        until = left.pop("until", None) or []
        until = (until,) if isinstance(until, str) else tuple(until)
        until += self.vocabularies[0].stop_strings if self._chats else ()
        limits = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        tokens = next((limit for limit in limits if limit is not None), MAX_TOKENS)
        temperature = left.pop("temperature", None)
        filters = {name: left.pop(name, None) for name in ("top_k", "top_p")}
        samples = left.pop("do_sample", bool(temperature))
        sampling = SamplingConfig(1.0 if temperature is None else float(temperature), **filters)
        sampling = sampling if samples else SamplingConfig()
        tokens = int(tokens) * (NEW_BYTES // NEW_TOKENS if self.reads_bytes else 1)
        if left:
            raise InputError(f"a task generates with {min(left)!r}, which is not implemented: leave the task out")
        return Generation(tokens, sampling, tuple(filter(None, until)))


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


# --- the harness itself -------------------------------------------------------------------------------------------


def import_harness() -> None:
    """Raises InputError if lm_eval is not there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tasks need the LM Evaluation Harness ({error}): pip install 'minalm[eval]' brings it"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(names: Sequence[str], include: Sequence[Path] = (), few_shot: int | None = None) -> dict[str, Any]:
    """The harness' tasks, with their data. `include`: folders with task files, which go before the harness' own.

    Raises InputError for an unknown task, one whose data cannot be had, and one that runs what the model writes.
    """
    import_harness()
    for folder in include:
        if not folder.is_dir():
            raise InputError(f"--include-path {folder} is no folder: name one that holds task files (.yaml)")
    manager = task_manager(tuple(map(str, include)))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}" if near else "lm-eval ls tasks lists them"
            raise InputError(f"there is no task {name!r}: {hint}; or name a folder that has it with --include-path")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise InputError(
                f"task {name} needs a package that is not installed ({error}): pip install it; "
                "'lm-eval[tasks]' brings those of all tasks"
            ) from error
        except Exception as error:  # datasets, the hub's client and the network raise whatever they raise
            raise InputError(
                f"the data of task {name} ({dataset_of(manager.task_index, name)}) cannot be had "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): connect to the Hugging Face hub, or "
                "give task files that point to data of your own with --include-path (benchmarks/tasks/prepare.py)"
            ) from error
        for part, values in loaded.items():
            found[part] |= values
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} runs the code that a model writes, which is not done here: leave it out")
        if few_shot is not None and task.get_config("num_fewshot") != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness' own
    return found


@functools.cache
def task_manager(include: tuple[str, ...]) -> Any:
    """The harness' own, which takes seconds to read its thousands of task files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include) or None)


def dataset_of(index: Mapping[str, Any], name: str) -> str:
    """The data set of a task, or of the first task of a group or tag."""
    entry = index.get(name)
    values = (entry.cfg or {}) if entry is not None else {}
    if values.get("dataset_path"):
        files = str((values.get("dataset_kwargs") or {}).get("data_files", ""))
        named = " ".join(filter(None, (values["dataset_path"], values.get("dataset_name"))))
        return f"dataset {named}{' of ' + files if files else ''}"
    parts = values.get("task") if isinstance(values.get("task"), list) else []
    tagged = [other for other, each in index.items() if name in each.tags]
    for part in [*(each if isinstance(each, str) else each.get("task", "") for each in parts), *sorted(tagged)]:
        if part != name and (found := dataset_of(index, part)) != "its dataset":
            return found
    return "its dataset"


def run_tasks(model: TaskModel, tasks: Mapping[str, Any], limit: int | None = None, chat: bool = False) -> dict:
    """The harness' results for tasks of `load_tasks`: {"results": {task: {"acc,none": ..., "acc_stderr,none": ...}},
    "groups", "n-samples", "samples", ...}. `limit`: the first so many items of each task; `chat`: contexts are written
    by the model's chat template."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class HarnessModel(LM):
        """A TaskModel as the harness calls it."""

        def loglikelihood(self, requests):
            return model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return model.loglikelihood_rolling([text for (text,) in (request.args for request in requests)])

        def generate_until(self, requests):
            return model.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return model.apply_chat_template(chat_history, add_generation_prompt)

        @property
        def tokenizer_name(self):
            return model.vocabularies[0].name.replace("/", "__")

    return evaluate(
        HarnessModel(),
        dict(tasks),
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=1000,
    )
