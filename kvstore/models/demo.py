"""The main job, shown on a model: keep a prompt cache, resume it in another process.

A document is prefilled once and saved with several codecs, and by mlx-lm itself. Then,
for each of them, a new process loads the model, restores the prompt cache, asks a
question about the document and answers. The answer is compared with that of the process
that never stopped; both feed the model the same tokens in the same steps.

A store keeps one copy of a block, whatever codec it was saved with. So each codec has a
store of its own here, in a temporary folder: nothing is left behind.

Run as a program, this module is that new process: a job on stdin, a run on stdout. It
imports nothing that imports MLX before OpenBLAS has had its chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blas import load_openblas
from ..errors import KVStoreError
from ..format.block import Progress, ignore_progress
from ..format.chain import common_run
from ..format.documents import JSON

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..store import Store
    from .load import LoadedModel

CODECS = ("raw", "planes+zstd", "turbo4+zstd", "turbo3+zstd", "turbo2+zstd")
QUESTION = "What is this text about? Answer in one sentence."
MAX_TOKENS = 48
NUM_TOKENS = 2000
NUM_TOKENS_SLOW = 256
"""Of the document, where a long one would take more than `_PATIENCE_S`."""
PREFILL = "prefill"
MLX_LM = "mlx-lm's file"
_PATIENCE_S = 60.0
_NUM_PROBE_TOKENS = 32
_BEGIN = "Read this text.\n\n"
_END = "\n\n---"
Bar = Callable[[str], Progress]
"""Returns the progress callback of what is named."""
Note = Callable[[str], None]
"""Called with a sentence on what happens."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a new process is to do; travels as JSON."""

    # Folder or repository, as mlx-lm takes it.
    model: str
    # Folder of an adapter.
    adapter_path: str | None
    # Let the model bring code of its own.
    trust_remote_code: bool
    # Tokens of the document.
    document: list[int]
    # Tokens that follow it.
    question: list[int]
    # Tokens of the answer, at most.
    max_tokens: int
    # What to restore from: a store, or a file of mlx-lm's.
    path: str = ""
    is_store: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process did, with the model loaded and the tokens ready."""

    # Seconds to have the prompt cache of the document.
    load_s: float
    # Seconds to the first logits behind the document, which one token more has to be
    # fed for.
    first_s: float
    # Seconds to the first token of the answer; the question is fed too.
    answer_s: float
    # Tokens of the answer.
    answer: list[int]


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the table."""

    # `prefill`, mlx-lm's own file, or a codec.
    way: str
    # Seconds to have the prompt cache, computed or loaded.
    load_s: float
    # Seconds to the first logits behind the document.
    first_s: float
    # How many times faster that is than prefill.
    speedup: float
    # Seconds to the first token of the answer.
    answer_s: float
    # The answer.
    answer: str
    # Leading tokens of the answer that are the same as without the store.
    num_same: int
    # Tokens of the answer.
    num_answer: int
    # Whether the whole answer is.
    is_same: bool
    # On disk; `None` where nothing is.
    nbytes: int | None = None
    # Seconds to save.
    save_s: float | None = None
    # Fewest tokens that are loaded faster than computed; `None` where that is not
    # known, or none are.
    pays_from: int | None = None

    @property
    def is_reference(self) -> bool:
        """Whether this is the prefill, with which all others are compared."""
        return self.way == PREFILL


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found."""

    # The model's name.
    model: str
    # Of the document.
    num_tokens: int
    # What was asked.
    question: str
    # The table; prefill first, mlx-lm's file next, then the codecs.
    rows: tuple[DemoRow, ...]


def run_demo(
    model: str,
    *,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
    document: Path | None = None,
    question: str | None = None,
    num_tokens: int | None = None,
    max_tokens: int = MAX_TOKENS,
    codecs: Sequence[str] = CODECS,
    bar: Bar = lambda what: ignore_progress,
    note: Note = lambda message: None,
) -> DemoResult:
    """Save a document's prompt cache, and resume it in new processes.

    Raises:
        CodecError: No such codec.
        UnsupportedCacheError: The model's prompt cache cannot be stored.
        KVStoreError: The model or the document cannot be read, or a new process failed.
    """
    text = _read_text(document)
    load_openblas()  # before MLX
    from ..codecs import get_codec

    for codec in codecs:
        get_codec(codec)  # a wrong name is told at once
    note(f"loading `{model}`")
    demo = _Demo(_load(model, adapter_path, trust_remote_code), bar, note)
    question = question or QUESTION
    tokens = demo.make_tokens(text, question, num_tokens)
    job = Job(model, adapter_path, trust_remote_code, *tokens, max_tokens)
    rows = demo.run(job, codecs)
    return DemoResult(model, len(job.document), question, tuple(rows))


def _load(model: str, adapter_path: str | None, trust_remote_code: bool) -> LoadedModel:
    load_openblas()  # before MLX
    from .load import load_models

    return load_models(model, adapter_path, trust_remote_code=trust_remote_code)


class _Demo:
    """The process that never stops."""

    def __init__(self, loaded: LoadedModel, bar: Bar, note: Note) -> None:
        self._loaded = loaded
        self._bar = bar
        self._note = note
        self._cache = _empty_cache(loaded.model)

    def make_tokens(
        self, text: str, question: str, num_tokens: int | None
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of the document and those of the question, as a chat."""
        from .templates import Template

        template = Template(self._loaded.tokenizer)
        num_tokens = num_tokens or self._choose_length(text)
        frame = template.encode_prompt(_BEGIN + _END, is_open=True)
        part = self._cut(text, max(1, num_tokens - len(frame)))
        message = f"{_BEGIN}{self._loaded.tokenizer.decode(part)}{_END}"
        document = template.encode_prompt(message, is_open=True)
        asked = f"\n\n{question}"
        return document, template.encode_next(asked, document)

    def run(self, job: Job, codecs: Sequence[str]) -> list[DemoRow]:
        """Prefill, save, answer; then resume everything saved in new processes."""
        self._note(f"prefilling {len(job.document):,} tokens")
        progress = self._bar(PREFILL)
        start = time.perf_counter()
        _read(self._loaded.model, self._cache, job.document, progress)
        prefill_s = time.perf_counter() - start
        with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder:
            paths = {MLX_LM: Path(folder) / "prompt_cache.safetensors"}
            paths |= {codec: Path(folder) / codec for codec in codecs}
            saved = {MLX_LM: self._save_file(paths[MLX_LM])}
            for codec in codecs:
                saved[codec] = self._save(job, codec, paths[codec], prefill_s)
            run = _answer(self._loaded, self._cache, job, prefill_s)
            rows = [self._make_row(PREFILL, run, run)]
            for number, (way, path) in enumerate(paths.items(), 1):
                self._note(f"{number} of {len(paths)}: {way} in a new process")
                task = replace(job, path=str(path), is_store=way != MLX_LM)
                rows.append(
                    self._make_row(way, _start_process(task), run, **saved[way])
                )
        return rows

    def _save_file(self, path: Path) -> JSON:
        from mlx_lm.models.cache import save_prompt_cache

        start = time.perf_counter()
        save_prompt_cache(str(path), self._cache)
        save_s = time.perf_counter() - start
        return {"nbytes": path.stat().st_size, "save_s": save_s}

    def _save(self, job: Job, codec: str, path: Path, prefill_s: float) -> JSON:
        """Save in a store of its own, and find from where on loading is faster."""
        from ..store import Store

        with Store(path, codec) as store:
            progress = self._bar(f"save {codec}")
            start = time.perf_counter()
            fingerprint = self._loaded.fingerprint
            store.save(job.document, self._cache, fingerprint, progress=progress)
            save_s = time.perf_counter() - start
            pays_from = self._find_break_even(store, job.document, prefill_s)
            nbytes = store.stats().nbytes
        return {"nbytes": nbytes, "save_s": save_s, "pays_from": pays_from}

    def _find_break_even(
        self, store: Store, document: list[int], prefill_s: float
    ) -> int | None:
        from ..ops.speeds import Speeds, add, observe

        now, digest = time.time(), self._loaded.fingerprint.digest
        known = None
        for number, part in enumerate((4, 1, 2, 3, 4)):
            start = time.perf_counter()
            wanted = [*document[: len(document) * part // 4], -1]
            _, rest = store.load(wanted, self._loaded.fingerprint)
            seconds, held = time.perf_counter() - start, len(wanted) - len(rest)
            found = observe(digest, "load", held, seconds=seconds, at=now)
            # The first load of a process says little of the next.
            if number and found is not None:
                known = add(known, found)
        computed = observe(digest, None, len(document), seconds=prefill_s, at=now)
        return Speeds(computed, known).break_even_tokens

    def _make_row(
        self, way: str, run: Outcome, without: Outcome, **saved: Any
    ) -> DemoRow:
        return DemoRow(
            way,
            run.load_s,
            run.first_s,
            without.first_s / run.first_s,
            run.answer_s,
            self._loaded.tokenizer.decode(run.answer),
            common_run(run.answer, without.answer),
            len(run.answer),
            run.answer == without.answer,
            **saved,
        )

    def _choose_length(self, text: str) -> int:
        """Return how long a document this machine reads in a time one can wait."""
        probe = self._cut(text, _NUM_PROBE_TOKENS)
        seconds = min(self._time(probe) for _ in range(2)) / len(probe)
        if seconds * NUM_TOKENS <= _PATIENCE_S:
            return NUM_TOKENS
        self._note(
            f"this machine reads {1 / seconds:.0f} tokens per second, so the document"
            f" has {NUM_TOKENS_SLOW} tokens instead of {NUM_TOKENS:,}"
        )
        return NUM_TOKENS_SLOW

    def _time(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        _read(
            self._loaded.model,
            _empty_cache(self._loaded.model),
            tokens,
            ignore_progress,
        )
        return time.perf_counter() - start

    def _cut(self, text: str, num_tokens: int) -> list[int]:
        # On average, no tokenizer makes one token of more letters.
        start = text[: 16 * num_tokens]
        tokens = self._loaded.tokenizer.encode(start, add_special_tokens=False)
        return list(tokens[:num_tokens])


def _read_text(path: Path | None) -> str:
    """Return the document; by default, of Python's manual, first what we ask about."""
    if path is None:
        from pydoc_data.topics import topics

        names = sorted(topics, key=lambda name: (name != "try", name))
        return "\n\n".join(topics[name] for name in names)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise KVStoreError(
            f"cannot read the document `{path}`: {reason}",
            hint="give a file of plain text",
        ) from error
    if not text.strip():
        raise KVStoreError(
            f"the document `{path}` is empty", hint="give a file of plain text"
        )
    return text


def _empty_cache(model: Any) -> list[Any]:
    """Return a prompt cache for a model, or say why it could not be stored."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..caches.live import check_classes

    prompt_cache: list[Any] = make_prompt_cache(model)
    check_classes(prompt_cache)
    return prompt_cache


def _read(
    model: Any, prompt_cache: list[Any], tokens: list[int], progress: Progress
) -> None:
    """Feed tokens in steps between which the bar moves; no logits are computed."""
    from ..models.session import PrefillOptions, compute

    progress(0, len(tokens))
    steps = compute([(model, prompt_cache)], tokens, PrefillOptions(step_s=1.0))
    for done, _ in steps:
        progress(done, len(tokens))


def _answer(
    loaded: LoadedModel, prompt_cache: list[Any], job: Job, before_s: float
) -> Outcome:
    """Feed the question, its first token alone, and answer it greedily."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    start = time.perf_counter() - before_s
    mx.eval(loaded.model(mx.array([job.question[:1]]), cache=prompt_cache))
    first_s = time.perf_counter() - start
    answer: list[int] = []
    answer_s = 0.0
    for token, _ in generate_step(
        mx.array(job.question[1:]),
        loaded.model,
        max_tokens=job.max_tokens,
        prompt_cache=prompt_cache,
    ):
        answer_s = answer_s or time.perf_counter() - start
        if token in loaded.tokenizer.eos_token_ids:
            break
        answer.append(int(token))
    return Outcome(before_s, first_s, answer_s, answer)


def _start_process(job: Job) -> Outcome:
    """Resume and answer in a new process, which is told nothing but the job."""
    finished = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(job)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise KVStoreError(
            f"the new process failed with exit code {finished.returncode}",
            hint="what it printed stands above",
        )
    reply = json.loads(finished.stdout)
    if "error" in reply:
        raise KVStoreError(reply["error"], hint=reply["hint"])
    return Outcome(**reply)


def _resume(job: Job) -> Outcome:
    """Restore the prompt cache and answer; runs in the new process."""
    loaded = _load(job.model, job.adapter_path, job.trust_remote_code)
    from mlx_lm.models.cache import load_prompt_cache

    from ..store import Store

    opened = Store(job.path, create=False) if job.is_store else nullcontext()
    with opened as store:
        start = time.perf_counter()
        if store is None:
            prompt_cache = list(load_prompt_cache(job.path))
        else:
            prompt_cache = _restore(job, store, loaded.fingerprint)
        restored_s = time.perf_counter() - start
        return _answer(loaded, prompt_cache, job, restored_s)


def _restore(job: Job, store: Store, fingerprint: Fingerprint) -> list[Any]:
    prompt = job.document + job.question
    found, rest = store.load(prompt, fingerprint)
    if found is None or len(rest) != len(job.question):
        match = store.lookup(prompt, fingerprint)
        raise KVStoreError(
            f"the store gave back {match.num_tokens:,} of {len(job.document):,}"
            f" tokens: {match.detail}",
            hint="`kvstore verify` looks for damage",
        )
    return found


def _main() -> int:
    """Do the job on stdin; what the model's libraries print goes to stderr."""
    job = Job(**json.load(sys.stdin))
    with redirect_stdout(sys.stderr):
        try:
            reply = asdict(_resume(job))
        except KVStoreError as error:
            reply = {"error": str(error), "hint": error.hint}
    print(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
