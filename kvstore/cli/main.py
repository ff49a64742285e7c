"""The command without a verb: what holds for all verbs, before or after them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from .. import __version__
from ..errors import KeyNotFoundError, StoreNotFoundError
from .output import Mode, Output
from .verbs import ALIASES, EXAMPLES, GROUPS, MODULES

if TYPE_CHECKING:
    from ..store import Store

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
log = logging.getLogger("kvstore")


class StoreParam(click.Path):
    """The folder of a store."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return the folder."""
        if not os.fspath(value):
            # As a path it would be the folder where the process is.
            self.fail("it is empty", param, ctx)
        # `--store=~/kv` reaches us as it stands: a shell leaves it alone.
        return super().convert(os.path.expanduser(value), param, ctx)


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        # Shared by the command and its verb; what comes later wins.
        context.meta[f"kvstore.{option.name}"] = value
    if option.name == "verbose" and value:
        log.setLevel(_LEVELS[min(value, 2)])


def _general_options(*, hidden: bool) -> list[click.Option]:
    common: dict[str, Any] = {
        "callback": _keep,
        "expose_value": False,
        "hidden": hidden,
        "show_default": False,
    }
    return [
        click.Option(
            ["--store"],
            type=StoreParam(path_type=Path),
            metavar="DIR",
            help="The store's folder.  [default: $KVSTORE_DIR, else"
            " $XDG_CACHE_HOME/kvstore, else ~/.cache/kvstore]",
            **common,
        ),
        click.Option(
            ["--base", "base_store"],
            type=StoreParam(path_type=Path),
            metavar="DIR",
            help="A store that is only read, on a share or a stick say: what it has is"
            " found too, behind what the store has.",
            **common,
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print one JSON document on stdout.",
            **common,
        ),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print ids only.", **common),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            help="Say more on stderr; -vv adds the traceback of an error.",
            **common,
        ),
    ]


class Verb(click.Command):
    """A verb; takes the general options too, and shows examples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += _general_options(hidden=True)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options; an error names this verb."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        lines = EXAMPLES.get(ctx.command_path.partition(" ")[2])
        if lines:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in lines))


class VerbGroup(click.Group):
    """A verb with verbs of its own."""

    command_class = Verb

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb by its name, or another that people try."""
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


class Verbs(Mapping[str, click.Command]):
    """The verbs by their names, and by others; imported when asked for.

    A verb is started without the others, which take a tenth of a second.
    """

    def __getitem__(self, name: str) -> click.Command:
        name = ALIASES.get(name, name)
        module = import_module(f".commands.{MODULES[name]}", __package__)
        verbs = (v for v in vars(module).values() if isinstance(v, click.Command))
        return next(verb for verb in verbs if verb.name == name)

    def __iter__(self) -> Iterator[str]:
        # A word that is no verb is compared with all that would have been one.
        return iter((*MODULES, *ALIASES))

    def __len__(self) -> int:
        return len(MODULES) + len(ALIASES)


class Root(VerbGroup):
    """The command; lists its verbs by what they are for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the verbs in the order of the groups."""
        return [name for names in GROUPS.values() for name in names]

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the verbs, a section for each group."""
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, _first_sentence(self.commands[name])) for name in names]
                )


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


@click.group(
    cls=Root,
    commands=cast("dict[str, click.Command]", Verbs()),
    params=cast("list[click.Parameter]", _general_options(hidden=False)),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 88,
        "show_default": True,
    },
    options_metavar="[OPTIONS]",
    subcommand_metavar="VERB [ARGS]...",
)
@click.version_option(__version__, prog_name="kvstore", message="%(prog)s %(version)s")
def cli() -> None:
    """Keep prompt caches of mlx-lm on disk, and go on from them without prefill.

    The options here may stand before the verb or after it. Exit codes: 0 done, 1 failed
    or not found or damage found, 2 wrong usage, 10 no store, 11 store locked, 130
    interrupted.
    """


def output_of(context: click.Context) -> Output:
    """Return where a verb puts what it has to say, in the one mode asked for."""
    modes: dict[str, Mode] = {"json": "json", "quiet": "quiet"}
    asked = [mode for name, mode in modes.items() if f"kvstore.{name}" in context.meta]
    if len(asked) > 1:
        raise click.UsageError("`--json` and `-q` exclude each other", context)
    return Output(*asked)


def open_store(
    context: click.Context, *, create: bool = False, codec: str | None = None
) -> Store:
    """Open the store, which ends with the verb; ``codec`` is for full blocks.

    Raises:
        StoreNotFoundError: There is none, nor a base, and it is not to be made.
        click.UsageError: Its path is not UTF-8, which the index needs.
    """
    from ..store import Store
    from .settings import limits

    path, base = chosen_path(context), context.meta.get("kvstore.base_store")
    # One's own store may still be to come where there is another to read.
    create = create or (base is not None and not context.resilient_parsing)
    open_it = partial(Store, path, codec, create=create, base=base, limits=limits())
    try:
        try:
            store = open_it()
        except KeyNotFoundError:
            can_ask = sys.stdin.isatty() and not context.resilient_parsing
            # Of both, where a base has a passphrase too.
            asked = [_unlock(each) for each in (path, base) if each and can_ask]
            if not any(asked):
                raise
            store = open_it()
    except NotADirectoryError as error:
        raise StoreNotFoundError(
            f"no store at {path}: a part of the path is no folder",
            hint="`--store DIR` chooses another",
        ) from error
    log.info("store: %s", store.path)
    return context.with_resource(store)


def chosen_path(context: click.Context) -> Path:
    """Return the folder of the store, there or not; refuse one that is not UTF-8."""
    from ..storage.folder import default_path

    path = context.meta.get("kvstore.store") or default_path()
    if not is_utf8(str(path)):
        raise click.UsageError(f"the path of the store is not UTF-8: {path}", context)
    return path


def _unlock(path: Path) -> bool:
    """Ask for the passphrase of a store, if it has one; whether somebody was asked."""
    from ..storage import vault
    from ..storage.folder import encryption_of

    encryption = encryption_of(path)
    if not (encryption and vault.needs_passphrase(encryption)):
        return False
    given = click.prompt(f"passphrase of {path}", hide_input=True, err=True)
    vault.unlock(encryption, given)
    return True


def is_utf8(text: str) -> bool:
    """Whether text from the command line, or from stdin, is UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def load_fast_blas() -> None:
    """Put a fast BLAS under MLX; works only before MLX is imported."""
    from ..blas import load_openblas

    log.info("OpenBLAS: %s", load_openblas() or "none")


def start_logging() -> None:
    """Send what ``-v`` asks for to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(_LEVELS[0])
    log.propagate = False
