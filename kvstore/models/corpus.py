"""Texts to calibrate a model with: what Python and the system bring, of many kinds.

No licence, no Perl manual and no release notes of Rust are among them: those are for
reports (`tools/quality.py`), which must not be on texts that a basis has seen.
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

_MODULES = ("statistics", "shutil", "textwrap", "random", "subprocess", "pathlib")
_CODE = ("argparse", "tarfile", "typing", "_pydecimal", "turtle", "http.server")
_MANUALS = Path("/usr/share/man")
_DOCUMENTS = ("/usr/share/vim/vim*/doc/usr_*.txt", "/usr/share/doc/*/changelog*.gz")
_LANGUAGES = ("de", "fr", "ja", "es", "ru", "zh_CN", "pt_BR", "it", "ko", "pl")
_MAX_LETTERS = 60_000
"""Of one text; a kind has several."""
Stretches = list[list[int]]


def usual_contexts(tokenizer: Any, count: int, length: int) -> Stretches:
    """Return stretches of the usual texts, of all kinds in turn.

    There are ``count``, or fewer, of ``length`` tokens each.
    """
    kinds = [_stretches(tokenizer, each, length) for each in _usual_texts(tokenizer)]
    return _in_turn(kinds, count)


def given_contexts(
    tokenizer: Any, texts: Sequence[str], count: int, length: int
) -> Stretches:
    """Return stretches of texts, of all in turn."""
    kinds = [_stretches(tokenizer, [text], length) for text in texts]
    return _in_turn(kinds, count)


def _stretches(
    tokenizer: Any, texts: Sequence[str], length: int
) -> Iterator[list[int]]:
    """Yield stretches, each begun as the tokenizer begins a text."""
    start = text_start(tokenizer)
    encoded = [tokenizer.encode(text)[len(start) :] for text in texts]
    yield from (start + found for found in cut(encoded, length - len(start)))


def text_start(tokenizer: Any) -> list[int]:
    """Return the tokens with which every text begins.

    Some models say nothing sensible without them.
    """
    begun = zip(tokenizer.encode(""), tokenizer.encode("a"), strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], begun)]


def cut(texts: Sequence[list[int]], length: int) -> Iterator[list[int]]:
    """Yield stretches of texts, which share no token: the middle ones first."""
    waiting: list[tuple[float, int, list[int]]] = []
    for tokens in texts:
        number = len(tokens) // length
        for i in range(number):
            begin = (len(tokens) - length) * i // max(1, number - 1)
            # Of every text one, before any has a second.
            order = abs(i - (number - 1) / 2)
            waiting.append((order, len(waiting), tokens[begin : begin + length]))
    yield from (tokens for _, _, tokens in sorted(waiting))


def _in_turn(kinds: list[Iterator[list[int]]], count: int) -> Stretches:
    found: Stretches = []
    while kinds and len(found) < count:
        for kind in list(kinds):
            tokens = next(kind, None)
            if tokens is None:
                kinds.remove(kind)
            elif len(found) < count:
                found.append(tokens)
    return found


def _usual_texts(tokenizer: Any) -> Iterator[list[str]]:
    from pydoc_data.topics import topics

    manual = "\n\n".join(topics[name] for name in sorted(topics))
    yield [manual[i : i + _MAX_LETTERS] for i in range(0, len(manual), _MAX_LETTERS)]
    yield [inspect.getsource(importlib.import_module(name)) for name in _CODE]
    yield list(_manual_pages(_MANUALS / "man1", 8))
    yield [chat_of(tokenizer, _MODULES)]
    yield [page for name in _LANGUAGES for page in _manual_pages(_MANUALS / name, 1)]
    yield ["\n\n".join(_read_mes())]
    yield [json.dumps(list(tools_of(_MODULES)), indent=1)]
    for pattern in _DOCUMENTS:
        texts = map(_read, _largest(Path("/").glob(pattern[1:]), 24))
        # Packages of one source have one changelog.
        yield list({text[len(text) // 2 :][:200]: text for text in texts}.values())[-6:]


def _functions(modules: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    for module in modules:
        for name, value in inspect.getmembers(importlib.import_module(module)):
            said = inspect.getdoc(value)
            is_own = getattr(value, "__module__", "") == module
            if said and is_own and callable(value) and not name.startswith("_"):
                yield f"{module}.{name}", value, said


def chat_of(tokenizer: Any, modules: Sequence[str]) -> str:
    """Return a long conversation on modules, as the model's template renders it."""
    turns = []
    for name, _, said in _functions(modules):
        turns.append({"role": "user", "content": f"What does `{name}` do in Python?"})
        turns.append({"role": "assistant", "content": textwrap.dedent(said)})
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def tools_of(modules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield functions of modules as agents are given tools."""
    for name, value, said in _functions(modules):
        try:
            parameters = list(inspect.signature(value).parameters)
        except (TypeError, ValueError):
            continue
        properties = {each: {"type": "string"} for each in parameters}
        schema = {"type": "object", "properties": properties, "required": parameters}
        function = {"name": name, "description": said[:300], "parameters": schema}
        yield {"type": "function", "function": function}


def _read_mes() -> Iterator[str]:
    for distribution in metadata.distributions():
        # Not every release of the library has `None` for what is not there.
        about: Any = distribution.metadata
        described = about.get("Description")
        if isinstance(described, str) and len(described) > 2000:
            yield described[: _MAX_LETTERS // 8]


def _manual_pages(folder: Path, count: int) -> Iterator[str]:
    """Yield the largest manual pages under a folder, without their markup."""
    named = (path for path in folder.glob("**/*.[1-8]*") if "perl" not in path.name)
    for path in _largest(named, count):
        text = re.sub(r"^[.'].?\"?\w* ?", "", _read(path), flags=re.MULTILINE)
        yield re.sub(r"\\f.|\\\(..|\\[-&,/]", "", text)


def _largest(paths: Iterable[Path], count: int) -> list[Path]:
    files = {path.resolve() for path in paths if path.is_file()}
    return sorted(files, key=lambda path: path.stat().st_size)[-count:]


def _read(path: Path) -> str:
    """Return the first letters of a text, which may be compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", errors="replace") as file:
        return str(file.read(_MAX_LETTERS))
