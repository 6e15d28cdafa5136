"""Goes on with a text, or talks.

    python -m minalm.generate MODEL "Once upon a time"
    python -m minalm.generate MODEL --chat
    python -m minalm.generate MODEL < prompt.txt > continuation.txt
    python -m minalm.generate BYTES --draft SUBWORDS "The capital of France"
    python -m minalm.generate BYTES_1 BYTES_2 --weights 2 1 --chat

A MODEL is a Hugging Face folder, its name on the hub as org/name,
  or a run (--out of train.py). Several models are an ensemble.

What a model says of how to sample (generation_config.json) holds
  unless a flag says otherwise. Standard output has the text alone.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Int
from tyro.conf import Positional, arg

from minalm.errors import InputError, check_at_least
from minalm.generation.engine import Prompt
from minalm.generation.kinds import generator_of
from minalm.generation.sampling import SamplingConfig
from minalm.generation.speculation import Draft, LookupDraft, ModelDraft, Pace, speculate
from minalm.generation.text import TextStream, stop_bytes
from minalm.huggingface.folder import GenerationConfig, read_generation_config
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.models.bolmo import Bolmo
from minalm.parallel.distributed import exit_on_input_error
from minalm.parallel.mesh import MeshConfig, make_mesh
from minalm.text.documents import Segment, Special
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.vocabulary import Vocabulary

Flat = arg(name="")  # the flags of a group without its name
NEW_BYTES = 1024
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


@dataclass(frozen=True)
class Sampling:
    """SamplingConfig, where what is not given is the model's own."""

    temperature: float | None = None
    """Logits are divided by it; 0: the most probable token, always."""
    top_k: int | None = None
    """Only so many tokens, the most probable ones."""
    top_p: float | None = None
    """Only the most probable tokens that have this probability together."""
    min_p: float | None = None
    """Only tokens at least this times as probable as the most probable one."""
    repetition_penalty: float | None = None
    """Logits of tokens that have occurred are divided by it where positive, else multiplied."""


@dataclass(frozen=True)
class Config:
    """What to generate."""

    arguments: Positional[
        tuple[Annotated[str, arg(metavar="MODEL [MODEL ...] [PROMPT]", help="a model or several, and a prompt.")], ...]
    ]
    prompt: str | None = None
    """The prompt, where it looks like a model. Without one it is read from standard input."""
    prompts: Path | None = None
    """A file with one prompt a line. For each, a line of JSON with prompt and continuation is written."""
    chat: bool = False
    """Talk, in the model's chat template. With a prompt: one answer."""
    system: str | None = None
    """The system message of a chat."""
    sampling: Annotated[Sampling, Flat] = Sampling()
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    max_bytes: int = NEW_BYTES
    """Bytes of text to write at most, for models of bytes and of subwords."""
    seed: int = 0
    """Of the samples."""
    draft: Path | None = None
    """Speculate: this subword model, the one that a byte student came from, proposes words. The text stays the same, or
    its distribution where it is sampled."""
    lookup: bool = False
    """Speculate: what followed the same bytes before is proposed."""
    stats: bool = False
    """Say on standard error what was proposed and accepted."""
    weights: tuple[float, ...] | None = None
    """Of an ensemble's models. Default: equal."""
    mean: Literal["probability", "log"] = "probability"
    """Of an ensemble: mean of probabilities, or of their logarithms."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What is computed in. Default: float32 on a CPU, else bfloat16."""
    batch_size: int = 8
    """Rows of --prompts that are written together."""
    mesh: MeshConfig = MeshConfig(fsdp=1)
    compilation_cache: Path | None = None
    """Folder in which JAX keeps compiled programs for the next start."""

    def check(self) -> None:
        """Raises InputError for settings that make no sense or do not go together."""
        check_at_least(self, {"max_bytes": 1, "batch_size": 1, "seed": 0})
        stop_bytes(self.stop)
        if self.seed >= 2**32:
            raise InputError(f"--seed is {self.seed}: it must be below 2^32")
        if self.draft is not None and self.lookup:
            raise InputError("--draft and --lookup both propose: choose one")
        if self.prompts is not None and (self.chat or self.draft is not None or self.lookup):
            other = "--chat" if self.chat else "--draft" if self.draft is not None else "--lookup"
            raise InputError(f"--prompts writes several texts at once, and {other} one: leave out one of them")
        if self.system is not None and not self.chat:
            raise InputError("--system is a message of a chat: give --chat too")


class Writer:
    """Models that write, as the settings say."""

    def __init__(self, config: Config, names: Sequence[Path]) -> None:
        self.config = config
        folders = [model_folder(name) for name in names]
        loaded = [LoadedModel.read(folder) for folder in folders]
        self.vocabularies: list[Vocabulary] = [model.vocabulary for model in loaded]
        for note in (note for vocabulary in self.vocabularies for note in vocabulary.notes):
            say(note)
        settings = [read_generation_config(folder) for folder in folders]
        bolmo = any(isinstance(model.model, Bolmo) for model in loaded)
        if bolmo and (config.draft is not None or config.lookup):
            raise InputError(
                "a Bolmo does not speculate, since its memories cannot go back: leave out --draft and --lookup"
            )
        lengths = [] if bolmo else [each.max_length for each in settings]  # a Bolmo's counts patches, not bytes
        self.positions = min(filter(None, lengths), default=None)
        self.sampling = sampling_of(config.sampling, settings[0], self.vocabularies[0], folders[0])
        self.sampling.check()
        self.stops = (*config.stop, *(self.vocabularies[0].stop_strings if config.chat else ()))
        mesh = make_mesh(config.mesh.fsdp or 1, config.mesh.tp)
        platform = mesh.devices.flat[0].platform
        self.dtype = jnp.dtype(config.dtype or ("float32" if platform == "cpu" else "bfloat16"))
        self.generator = generator_of(loaded, mesh, self.dtype, config.weights, config.mean)
        self.draft: Draft | None = LookupDraft() if config.lookup else None
        self.pace = Pace()
        if config.draft is not None:
            subwords = generator_of([LoadedModel.read(config.draft)], mesh, self.dtype)
            self.draft = ModelDraft(subwords, self.vocabularies[0])
        self.readers = [
            ChatReader(vocabulary, vocabulary, False, datetime.date.today().isoformat())
            for vocabulary in self.vocabularies
        ]

    def text(self, prompt: str) -> Prompt:
        """The ids of a text to go on with, bos before it where the model wants one."""

        def ids(vocabulary):
            start = [Segment(Special("bos"))] if vocabulary.adds_bos or not prompt else []
            return encoded(vocabulary, (*start, Segment(vocabulary.normalize(prompt))))

        return tuple(map(ids, self.vocabularies))

    def messages(self, messages: Sequence[dict[str, str]]) -> Prompt:
        """The ids of a chat, in each model's own template, up to where an answer begins; the bare texts, a line each, if no
        model has one."""
        if not any(vocabulary.chat_template for vocabulary in self.vocabularies):
            return self.text("".join(message["content"] + "\n" for message in messages))
        rows = [reader({"messages": list(messages)}, add_generation_prompt=True) for reader in self.readers]
        return tuple(map(encoded, self.vocabularies, rows))

    def conversation(self, messages: list[dict[str, str]]) -> Prompt:
        """The ids of `messages`, from which the oldest questions and their answers are taken, and said to be, as long as less
        than a quarter of the model's positions is left for an answer."""
        while True:
            prompt = self.messages(messages)
            questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
            if self.positions is None or len(questions) == 1:
                return prompt
            if 4 * max(map(len, prompt)) <= 3 * self.positions:
                return prompt
            del messages[questions[0] : questions[1]]
            say(f"the oldest question and its answer are left out: the model has {self.positions:,} positions")

    def room(self, prompts: Sequence[Prompt]) -> int:
        """Tokens that may follow prompts. Raises InputError for one that is too long."""
        longest = max(len(ids) for prompt in prompts for ids in prompt)
        if self.positions is None:
            return self.config.max_bytes
        if longest >= self.positions:
            raise InputError(
                f"a prompt has {longest:,} tokens and the model {self.positions:,} positions (max_position_embeddings): "
                "give a shorter one"
            )
        return min(self.config.max_bytes, self.positions - longest)

    def write(self, prompt: Prompt, show: Callable[[str], None]) -> str:
        """The continuation of a prompt, shown as it comes."""
        config, vocabulary, parts = self.config, self.vocabularies[0], []
        stream = TextStream(stop_bytes(self.stops), config.max_bytes)

        def take(text):
            parts.append(text)
            show(text)

        room = self.room([prompt])
        with interrupts_between_steps() as check_interrupt:

            def on_tokens(_, new):
                take(stream.add(b"".join(vocabulary.token_bytes[i] for i in new)))
                check_interrupt()

            common = dict(
                stop_ids=self.stop_ids,
                stop_strings=self.stops,
                seed=config.seed,
                on_tokens=on_tokens,
                max_bytes=config.max_bytes,
            )
            if self.draft is None:
                [ids] = self.generator.generate([prompt], self.sampling, room, **common)
            else:
                ids, statistics = speculate(
                    self.generator, prompt[0], self.draft, self.sampling, room, **common, pace=self.pace
                )
                if config.stats:
                    say(str(statistics))
        take(stream.close())
        if len(ids) == room < config.max_bytes:
            say(f"the model's {self.positions:,} positions (max_position_embeddings) are full")
        return "".join(parts)

    def write_all(self, texts: Sequence[str]) -> Iterator[str]:
        """The continuations of texts, some at a time."""
        config, vocabulary = self.config, self.vocabularies[0]
        for start in range(0, len(texts), config.batch_size):
            prompts = [self.text(text) for text in texts[start : start + config.batch_size]]
            streams = [TextStream(stop_bytes(config.stop), config.max_bytes) for _ in prompts]
            parts: list[list[str]] = [[] for _ in prompts]

            with interrupts_between_steps() as check_interrupt:

                def on_tokens(row, new, streams=streams, parts=parts, check_interrupt=check_interrupt):
                    parts[row].append(streams[row].add(b"".join(vocabulary.token_bytes[i] for i in new)))
                    check_interrupt()

                self.generator.generate(
                    prompts,
                    self.sampling,
                    self.room(prompts),
                    self.stop_ids,
                    config.stop,
                    config.seed + start,
                    on_tokens,
                    config.max_bytes,
                )
            yield from ("".join([*said, stream.close()]) for said, stream in zip(parts, streams, strict=True))

    @property
    def stop_ids(self) -> list[int]:
        return self.vocabularies[0].stop_ids


def encoded(vocabulary: Vocabulary, piece: Sequence[Segment]) -> Int[np.ndarray, " time"]:
    """The ids of a document. Raises InputError for one that has none."""
    [encoding] = vocabulary.encode([tuple(piece)])
    if not len(encoding.ids):
        raise InputError(f"the prompt is empty, and {vocabulary.name} has no token to begin a text with: give a prompt")
    if not encoding.round_trips:
        say(f"{vocabulary.name} cannot spell the prompt exactly: the model reads something like it")
    return encoding.ids


def sampling_of(given: Sampling, own: GenerationConfig, vocabulary: Vocabulary, folder: Path) -> SamplingConfig:
    """What is given, and else what the model's generation_config.json says, which is said on standard error."""
    values = dict(own.sampling)
    samples = values.pop("do_sample", False)
    if not samples:
        values = {name: value for name, value in values.items() if name == "repetition_penalty"}
    else:
        values.setdefault("temperature", 1.0)
    if vocabulary.tokenizer is None and "repetition_penalty" in values:
        if values.pop("repetition_penalty") != 1.0 and given.repetition_penalty is None:
            say("repetition_penalty of generation_config.json is left out: of bytes, nearly all have occurred")
    known = {name: value for name, value in vars(given).items() if value is not None}
    if known.get("temperature") == 0.0:
        values = {name: value for name, value in values.items() if name == "repetition_penalty"}
    used = {name: value for name, value in values.items() if name not in known}
    if used:
        say(f"{folder / 'generation_config.json'}: " + ", ".join(f"{name} {value}" for name, value in used.items()))
    merged = {**used, **known}
    merged.setdefault("temperature", 1.0 if {"top_k", "top_p", "min_p"} & known.keys() else 0.0)
    if merged.get("top_k") == 0:  # transformers' word for all
        merged.pop("top_k")
    return SamplingConfig(**merged)


def say(text: str) -> None:
    """A line beside the text."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Within it, Ctrl-C is kept until the function that it gives is called, which then raises KeyboardInterrupt: in the
    middle of a step, an exception would leave buffers that are given away, or crash the compiler. A second Ctrl-C ends
    the program at once."""
    pressed = False

    def press(*_):
        nonlocal pressed
        if pressed:
            os._exit(130)
        pressed = True

    def check():
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
        yield check
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()  # pressed after the last token


def show(text: str) -> None:
    """A part of the text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], str | None]:
    """The models, and the prompt if the last argument is none. Raises InputError."""

    def is_model(word):
        return os.path.exists(word) or re.fullmatch(HUB_NAME, word, re.ASCII) is not None

    if not arguments:
        raise InputError("there is no model: name a Hugging Face folder, a run, or org/name of the hub")
    *others, last = arguments
    if len(arguments) > 1 and not is_model(last):
        return [Path(word) for word in others], last
    return [Path(word) for word in arguments], None


def talk(writer: Writer, prompt: str | None, messages: list[dict[str, str]]) -> None:
    """A conversation, or one answer to a prompt."""
    asks = prompt is None
    if not any(vocabulary.chat_template for vocabulary in writer.vocabularies):
        say("the model has no chat template: it goes on with what is said, as with any text")
    if asks and sys.stdin.isatty():
        say("an empty line, Ctrl-D or Ctrl-C ends the conversation; Ctrl-C within an answer ends the answer")
    while True:
        if asks:
            line = asked()
            if not line:
                return
            prompt = line
        messages.append({"role": "user", "content": prompt})
        parts: list[str] = []

        def heard(text, parts=parts):
            parts.append(text)
            show(text)

        try:
            writer.write(writer.conversation(messages), heard)
        except KeyboardInterrupt:
            if not asks:
                raise
        show("\n")
        if not asks:
            return
        messages.append({"role": "assistant", "content": "".join(parts)})


def asked() -> str:
    """What the user says; "" at the end."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        return sys.stdin.readline().rstrip("\n")
    except KeyboardInterrupt:
        say("")
        return ""


def run(config: Config) -> None:
    """Everything that can be wrong is found before anything is written."""
    config.check()
    names, prompt = split_arguments(config.arguments)
    if prompt is not None and config.prompt is not None:
        raise InputError(f"there are two prompts, {prompt!r} and --prompt: keep one")
    prompt = config.prompt if prompt is None else prompt
    lines = None
    if config.prompts is not None:
        if prompt is not None:
            raise InputError("there is a prompt beside --prompts: keep one")
        try:
            lines = config.prompts.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{config.prompts} is not UTF-8 ({error}): give a text file") from error
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.compilation_cache))
    writer = Writer(config, names)
    if lines is not None:
        for line, text in zip(lines, writer.write_all(lines)):
            show(json.dumps({"prompt": line, "continuation": text}, ensure_ascii=False) + "\n")
    elif config.chat:
        talk(writer, prompt, [] if config.system is None else [{"role": "system", "content": config.system}])
    else:
        if prompt is None:
            prompt = read_standard_input()
        writer.write(writer.text(prompt), show)
        if sys.stdout.isatty():
            show("\n")


def read_standard_input() -> str:
    """All of it, without the last line break. Raises InputError if it is no text."""
    if sys.stdin.isatty():
        say("the prompt (Ctrl-D ends it):")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 ({error}): give a text") from error


def parse(arguments: Sequence[str]) -> Config:
    """The settings of a command line. Models and prompt may stand on both sides of the flags."""
    settings = dict(prog="python -m minalm.generate", description=__doc__)
    config, rest = tyro.cli(Config, args=list(arguments), return_unknown_args=True, **settings)
    if any(word.startswith("-") for word in rest):
        tyro.cli(Config, args=[*arguments], **settings)  # ends with tyro's own message
    return replace(config, arguments=(*config.arguments, *rest))


def cli(arguments: Sequence[str]) -> None:
    """The program. Ctrl-C ends it with code 130, and a reader that has gone away without a word."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        with exit_on_input_error():
            run(parse(arguments))
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    cli(sys.argv[1:])
