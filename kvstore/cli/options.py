"""Options that several verbs share, spelled as mlx-lm spells them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ..errors import EntryNotFoundError, StoreNotFoundError
from ..format.block import EXACT_BITS
from ..format.calibration import EXACT, QUALITIES, UNMEASURED
from ..format.documents import JSON
from .completion import complete_codecs, complete_entries, complete_models
from .main import is_utf8
from .output import HintedError, print_line
from .settings import setting, some_bytes

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..models.load import LoadedModel
    from ..models.session import CacheOptions, PrefillOptions
    from ..models.session import SamplingOptions as Sampling
    from ..models.templates import Template
_ARGUMENT = "kvstore.prompt"
_QUALITY = "kvstore.quality"
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model."""

    # A folder or a Hugging Face repository; ``None`` until it is chosen.
    model: str
    # Folder of an adapter, or ``None``.
    adapter_path: str | None
    # Let it bring code of its own.
    trust_remote_code: bool

    def chosen(self, context: click.Context, ref: str | None = None) -> ModelOptions:
        """Return the same with a model; that of an entry where none is named."""
        from .main import open_store

        model: str | None = self.model
        hint = "`$KVSTORE_MODEL` sets one for all"
        if model is None and ref is not None:
            try:
                model = open_store(context).entry(ref).model
            except (StoreNotFoundError, EntryNotFoundError) as missing:
                hint = f"{missing}, whose model it would be; {hint}"
        if model is None:
            raise HintedError("missing option `--model`", hint)
        return dataclasses.replace(self, model=model)

    def fingerprint(self) -> Fingerprint:
        """Return the model's fingerprint; no weights are loaded."""
        from ..models.load import fingerprint_model

        return fingerprint_model(self.model, self.adapter_path)

    def load(self, draft_model: str | None = None) -> LoadedModel:
        """Load the model, and a draft model if there is one."""
        from ..models.load import load_models

        return load_models(
            self.model,
            self.adapter_path,
            draft_model,
            trust_remote_code=self.trust_remote_code,
        )

    def made_by(
        self, draft_model: str | None = None
    ) -> tuple[list[Any] | None, Fingerprint | None]:
        """Return empty cache and fingerprint that an entry must be of, if any."""
        if self.model is None:
            return None, None
        from ..models.session import load_empty_cache

        return load_empty_cache(
            self.model,
            self.adapter_path,
            draft_model,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How a conversation is rendered."""

    system_prompt: str | None
    # More variables for the chat template.
    chat_template_config: JSON | None
    # Take what is said as plain text.
    ignore_chat_template: bool

    def template(self, tokenizer: Any) -> Template:
        """Return how a conversation is rendered."""
        from ..models.templates import Template

        return Template(
            tokenizer, self.chat_template_config, ignore=self.ignore_chat_template
        )


@dataclass(frozen=True, slots=True)
class PromptOptions(TemplateOptions):
    """What to say to it."""

    # The text, or ``-`` for stdin; ``None`` where it is an argument, or piped.
    prompt: str | None

    def read(self) -> str:
        """Return the text, and refuse one that is missing, empty or not UTF-8."""
        words = click.get_current_context().meta.get(_ARGUMENT)
        if words is not None and self.prompt is not None:
            raise click.UsageError("give the prompt once: as an argument or `--prompt`")
        given = self.prompt if words is None else words
        is_piped = given is None and not sys.stdin.isatty()
        try:
            text = sys.stdin.read() if is_piped or given == "-" else given
        except UnicodeDecodeError:
            text = "\udcff"
        if not text:
            is_missing = given is None
            raise click.UsageError(
                "missing option `--prompt`" if is_missing else "the prompt is empty"
            )
        if not is_utf8(text):
            raise click.UsageError("the prompt is not UTF-8")
        if text == given and os.path.isfile(text):
            print_line("hint", f"`{text}` is a file: `< {text}` gives its text", "cyan")
        return text


def read_source(prompt: PromptOptions, file: BinaryIO | None) -> str | JSON:
    """Return what a prompt is made of: a text, or a captured request in its place."""
    if file is None:
        return prompt.read()
    if prompt.prompt is not None or _ARGUMENT in click.get_current_context().meta:
        raise click.UsageError("give either a prompt or `--request`")
    if prompt.system_prompt is not None or prompt.ignore_chat_template:
        raise click.UsageError(
            "`--request` has its own messages: leave out `--system-prompt` and"
            " `--ignore-chat-template`"
        )
    return read_request("--request", file)


def read_request(option: str, file: BinaryIO) -> JSON:
    """Return a captured request, and refuse what is no JSON object."""
    try:
        return json_object(file.read())
    except click.BadParameter as error:
        raise click.UsageError(f"`{option}` is {error.message}") from error


def encode_source(
    tokenizer: Any, source: str | JSON, prompt: PromptOptions, *, is_open: bool = False
) -> list[int]:
    """Return the tokens of what :func:`read_source` returned.

    Args:
        tokenizer: The model's.
        source: A text, or a request.
        prompt: How a text is rendered.
        is_open: Leave a text's message open, so that more can be added to it.
    """
    if not isinstance(source, str):
        from ..server.requests import encode_request

        config = prompt.chat_template_config
        return encode_request(tokenizer, source, chat_template_args=config)
    template = prompt.template(tokenizer)
    return template.encode_prompt(source, prompt.system_prompt, is_open=is_open)


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How the live cache is filled and kept."""

    # As a model, or ``None``.
    draft_model: str | None
    # How many tokens it guesses at a time.
    num_draft_tokens: int
    # Rows kept per layer, or ``None`` for all.
    max_kv_size: int | None
    # A mode of quantization, or ``None``.
    kv_bits: int | str | None
    # Go on from exact rows only.
    exact: bool
    # Go on from rows of at least so many bits only.
    min_bits: int

    @property
    def least_bits(self) -> int:
        """What both options ask for."""
        return least_bits(self.exact, self.min_bits)

    def make_cache_options(self) -> CacheOptions:
        """Return how the prompt cache is made."""
        from ..models.session import CacheOptions

        return CacheOptions(self.max_kv_size, self.kv_bits, min_bits=self.least_bits)

    def check(self) -> None:
        """Refuse what cannot be had together, before a model is loaded.

        Dropped rows can neither be coded nor taken back, and codes are not exact.
        """
        if self.exact and self.kv_bits is not None:
            raise click.UsageError("`--exact` and `--kv-bits` exclude each other")
        if self.max_kv_size is None:
            return
        others = {"--draft-model": self.draft_model, "--kv-bits": self.kv_bits}
        for other, value in others.items():
            if value is not None:
                raise click.UsageError(
                    f"`--max-kv-size` and `{other}` exclude each other"
                )


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is drawn."""

    # Temperature; 0 takes the likeliest.
    temp: float
    # Draw from the likeliest that together have this probability.
    top_p: float
    # Draw from so many; 0 from all.
    top_k: int
    # Of the random numbers, or ``None``.
    seed: int | None

    def make(self, max_tokens: int, num_draft_tokens: int) -> Sampling:
        """Return how a reply is drawn, with the seed set."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        from ..models.session import SamplingOptions as Sampling

        if self.seed is not None:
            mx.random.seed(self.seed)
        sampler = make_sampler(self.temp, self.top_p, top_k=self.top_k)
        return Sampling(max_tokens, sampler, num_draft_tokens=num_draft_tokens)


# What an option is parsed with. click puts the option's name before what is wrong.
def entry_name(text: str) -> str:
    """Return a name for an entry."""
    from ..format.entry import check_name

    try:
        check_name(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


def utf8(text: str) -> str:
    """Return text that is UTF-8."""
    if not is_utf8(text):
        raise click.BadParameter("not UTF-8")
    return text


def some_text(text: str) -> str:
    """Return text that is UTF-8 and not empty."""
    if not utf8(text):
        raise click.BadParameter("it is empty")
    return text


def codec_name(text: str) -> str:
    """Return the name of a codec."""
    from ..codecs import get_codec
    from ..errors import CodecError

    try:
        return get_codec(text).name
    except CodecError as error:
        failure = click.BadParameter(str(error))
        failure.hint = error.hint  # type: ignore[attr-defined]
        raise failure from error


def json_object(text: str | bytes) -> JSON:
    """Return a JSON object."""
    try:
        # Of bytes, `loads` would guess the encoding; a server takes UTF-8.
        found = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise click.BadParameter(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise click.BadParameter("nested too deeply") from error
    if not isinstance(found, dict):
        raise click.BadParameter("not a JSON object")
    return found


def percentage(text: str) -> float:
    """Return a part such as ``10%`` as a number from 0 to 1."""
    try:
        part = float(text.removesuffix("%")) / 100
    except ValueError:
        part = -1
    if not (text.endswith("%") and 0 <= part <= 1):
        raise click.BadParameter(f"`{text}` is not a percentage such as 10%")
    return part


def kv_bits(text: str) -> int | str:
    """Return a mode of the live cache: ``turbo3``, or mlx-lm's number of bits."""
    if text in ("2", "3", "4", "5", "6", "8"):
        return int(text)
    if not re.fullmatch(r"turbo[1-8](v[1-8])?", text):
        known = "turbo4, turbo3, turbo2, turbo5v3, 8, 6, 5, 4, 3 or 2"
        raise click.BadParameter(f"`{text}` is not one of {known}")
    return text


def daily_bytes(text: str) -> int:
    """Return the bytes of what may be written in a day, ``50GB/day``."""
    return some_bytes(text.lower().removesuffix("/day"))


def span(text: str) -> float:
    """Return the seconds of a length of time such as ``30d``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.lower())
    if match is None:
        raise click.BadParameter(f"`{text}` is not a length of time such as 30d")
    return float(match[1]) * _SPANS[match[2]]


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """Declare an option as click does, what it takes behind its flag: ``--seed N``.

    One that takes nothing and has no type is on or off.
    """
    flags = [name.partition(" ") for name in names]
    metavar = "".join(takes for _, _, takes in flags) or None
    if metavar is None and "type" not in settings:
        settings["is_flag"] = True
    return click.option(*(flag for flag, _, _ in flags), metavar=metavar, **settings)


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return what adds options to a verb, whose `--help` shows them in this order."""

    def add(command: F) -> F:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def gathered(name: str, kind: type[Any]) -> Callable[[F], F]:
    """Hand the options that are fields of ``kind`` over as one argument ``name``."""

    def wrap(command: F) -> F:
        @functools.wraps(command)
        def call(*args: Any, **options: Any) -> Any:
            names = (field.name for field in dataclasses.fields(kind))
            values = {name: options.pop(name) for name in names}
            return command(*args, **{name: kind(**values)}, **options)

        return call  # type: ignore[return-value]

    return wrap


ref = click.argument("ref", metavar="REF", shell_complete=complete_entries)
refs = click.argument(
    "refs", metavar="REF...", nargs=-1, required=True, shell_complete=complete_entries
)
yes = option("-y", "--yes", help="Do not ask.")
overwrite = option("--overwrite", help="Replace the file if it is there.")
name = option(
    "--name NAME",
    type=entry_name,
    shell_complete=complete_entries,
    help="A name for the entry.",
)


base = option(
    "--from REF",
    "base",
    shell_complete=complete_entries,
    help="Begin with what this entry holds, and leave it as it is; nothing is kept"
    " unless `--name` says under which new name.",
)


def max_tokens(default: int, help: str) -> Callable[[F], F]:
    """Return the option that bounds a reply, in tokens."""
    return option(
        "--max-tokens N", type=click.IntRange(min=1), default=default, help=help
    )


def check_base(base: str | None, name: str | None) -> None:
    """Refuse to leave an entry as it is and to go on with it at once."""
    if base is not None and base == name:
        raise HintedError(
            f"`--from` and `--name` are both `{name}`",
            "`--name` alone goes on with it; `--from` alone leaves it as it is",
        )


def model_options(command: F, *, is_needed: bool = True) -> F:
    """Add the options that choose a model; they come as one ``ModelOptions``."""
    return all_of(
        option(
            "--model MODEL",
            type=some_text,
            default=(lambda: setting("model")) if is_needed else None,
            show_default=False,
            # In a file, a variable, or behind `=`, no shell puts the folder for it.
            callback=lambda _, __, model: model and os.path.expanduser(model),
            shell_complete=complete_models,
            help="Folder of the model, or its Hugging Face repository."
            + ("  [default: $KVSTORE_MODEL]" * is_needed),
        ),
        option(
            "--adapter-path DIR", type=some_text, help="Folder of an adapter's weights."
        ),
        option(
            "--trust-remote-code",
            help="Let the model and its tokenizer bring code of their own.",
        ),
        gathered("model", ModelOptions),
    )(command)


def _note(key: str, context: click.Context, _: click.Parameter, value: Any) -> None:
    if value is not None:
        context.meta[key] = value


def prompt_options(command: F, *, is_argument: bool = True) -> F:
    """Add the options that make a prompt; they come as one ``PromptOptions``."""
    prompt = option(
        "--prompt TEXT",
        help="The prompt; `-` reads it from stdin."
        + ("  [default: PROMPT, else what is piped]" * is_argument),
    )
    command = prompt(_template_options(gathered("prompt", PromptOptions)(command)))
    if not is_argument:
        return command
    return click.argument(
        "words",
        metavar="[PROMPT]",
        required=False,
        expose_value=False,
        callback=functools.partial(_note, _ARGUMENT),
    )(command)


_template_options = all_of(
    option("--system-prompt TEXT", type=utf8, help="What the system says first."),
    option(
        "--chat-template-config JSON",
        type=json_object,
        help="More variables for the chat template, such as '{\"key\": true}'.",
    ),
    option("--ignore-chat-template", help="Take the prompt as plain text."),
)
template_options = all_of(_template_options, gathered("template", TemplateOptions))
"""The options of chat templates; they come as one ``TemplateOptions``."""
sampling_options = all_of(
    option(
        "--temp T",
        type=click.FloatRange(min=0),
        default=0.0,
        help="Sampling temperature; 0 takes the likeliest token.",
    ),
    option(
        "--top-p P",
        type=click.FloatRange(0, 1),
        default=1.0,
        help="Sample from the likeliest tokens that together have this probability.",
    ),
    option(
        "--top-k K",
        type=click.IntRange(min=0),
        default=0,
        help="Sample from so many of the likeliest tokens; 0 from all.",
    ),
    option("--seed N", type=int, help="Seed of the sampling."),
    gathered("sampling", SamplingOptions),
)
"""The options of sampling; they come as one ``SamplingOptions``."""
_EXACT = "Go on from stored rows only where nothing lossy went into them"
exact = option(
    "--exact",
    help=f"{_EXACT}; without `--codec` and `--quality`, store with planes+zstd.",
)
exact_only = option("--exact", help=f"{_EXACT}.")
min_bits = option(
    "--min-bits N",
    type=click.IntRange(0, 8),
    default=0,
    show_default=False,
    help="Go on from lossy rows only where they have N bits per number at least;"
    " a `fit` counts as the widest `turbo` that was measured to lose no less, or as"
    " 2 more than its rate.",
)
live_options = all_of(
    option(
        "--draft-model MODEL",
        type=some_text,
        help="A smaller model of the same family, which guesses what comes.",
    ),
    option(
        "--num-draft-tokens N",
        type=click.IntRange(min=1),
        default=3,
        help="Tokens to guess at a time.",
    ),
    option(
        "--max-kv-size N",
        # The first 4 rows are kept for good.
        type=click.IntRange(min=8),
        help="Keep the last N rows per layer, where the model does not say.",
    ),
    option(
        "--kv-bits BITS",
        type=kv_bits,
        help="Keep the live cache quantized: turbo4, turbo3, turbo2, turbo5v3, or"
        " 8, 6, 5, 4, 3, 2 bits as mlx-lm does.",
    ),
    exact,
    min_bits,
    gathered("live", LiveOptions),
)
"""The options of the live cache; they come as one ``LiveOptions``."""


request = option(
    "--request FILE.json",
    type=click.File("rb"),
    help="In place of a prompt: what a client posts to /v1/chat/completions, rendered"
    " as `serve` renders it; `-` reads stdin. `--chat-template-config` is then the"
    " server's `--chat-template-args`.",
)
prefill_step_size = option(
    "--prefill-step-size N",
    type=click.IntRange(min=1),
    help="Prompt tokens to compute at a time; between two of them progress is shown and"
    " Ctrl-C obeyed.  [default: what takes about a second, 2048 at most]",
)


def prefilling(step_size: int | None, checkpoint_every: int) -> PrefillOptions:
    """Return how a prompt is computed; by default in steps of about a second."""
    from ..models.session import PREFILL_STEP_SIZE, PrefillOptions

    if step_size is not None:
        return PrefillOptions(step_size, checkpoint_every)
    most = PREFILL_STEP_SIZE
    return PrefillOptions(most, checkpoint_every, save_every=most, step_s=1.0)


checkpoint_every = option(
    "--checkpoint-every N",
    type=click.IntRange(min=1),
    default=2048,
    help="Of a model with recurrent layers, keep the state every N prompt tokens.",
)


def least_bits(exact: bool, min_bits: int) -> int:
    """Return what `--exact` and `--min-bits` ask for together."""
    return EXACT_BITS if exact else min_bits


def codec_of(chosen: str | None, least_bits: int, usual: str = "balanced") -> str:
    """Return the codec, or the quality, of a run that goes on from rows of some bits.

    It stores no fewer: a quality is then what it is for a model that nobody has
    measured, and a codec of fewer bits is refused.
    """
    wanted = chosen or setting("codec") or usual
    if not least_bits:
        return wanted
    from ..codecs import get_codec

    codec = get_codec(UNMEASURED.get(wanted, wanted))
    if codec.bits >= least_bits:
        return codec.name
    if chosen is None:
        return EXACT
    option = "quality" if chosen in QUALITIES else "codec"
    raise click.UsageError(
        f"`--{option} {chosen}` stores {codec.bits} bits per number, and more are"
        f" wanted: leave it out, or take {EXACT}"
    )


def codec(command: F) -> F:
    """Add `--codec` and `--quality`, of which the verb is given one as ``codec``."""
    return _codec(_quality(command))


def _codec_or_quality(
    context: click.Context, _: click.Parameter, codec: str | None
) -> str | None:
    quality: str | None = context.meta.get(_QUALITY)
    if codec is not None and quality is not None:
        raise HintedError(
            "`--codec` and `--quality` exclude each other",
            "a quality chooses the codec",
        )
    return codec or quality


_quality = option(
    "--quality",
    type=click.Choice(QUALITIES),
    expose_value=False,
    is_eager=True,
    callback=functools.partial(_note, _QUALITY),
    help="Store with the smallest codec that `kvstore calibrate` has measured to change"
    " what this model says by no more: KL 0.001 for high, 0.003 for balanced, 0.01 for"
    " small. Of a model that is not measured: "
    + ", ".join(f"{name} is {codec}" for name, codec in UNMEASURED.items())
    + ", and nobody knows what they change.  [default: balanced; high for chat and"
    " serve]",
)
_codec = option(
    "--codec CODEC",
    type=codec_name,
    shell_complete=complete_codecs,
    callback=_codec_or_quality,
    help="How blocks are stored: raw, planes, turbo2 to turbo8, turbo5v3, …, each"
    " with +zstd or not.  [default: $KVSTORE_CODEC, else what `--quality` says]",
)
replace = option(
    "--replace", help="Take the name from an entry that this one does not continue."
)
output_file = option(
    "-o",
    "--output FILE",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write; it ends in .safetensors.",
)
