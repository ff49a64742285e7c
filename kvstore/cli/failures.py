"""Every error as two lines, ``error:`` and ``hint:``, and an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Sequence

import click

from ..blas import BACK_END_REMEDY
from ..errors import KVStoreError
from .main import log, start_logging
from .output import print_failure

INTERRUPTED = 130
USAGE = 2
_HINTS = {
    errno.ENOSPC: "free some space and try again; what was saved before is whole",
    errno.EDQUOT: "free some space and try again; what was saved before is whole",
    errno.EACCES: "check owner and mode of the folder, or choose another",
    errno.EPERM: "check owner and mode of the folder, or choose another",
    errno.EROFS: "choose a folder that can be written, with `--store DIR`",
    errno.EIO: "the disk fails: look at the system's log before you write to it again",
    errno.EADDRINUSE: "another program listens there: choose another with `--port`",
    errno.EMFILE: "raise the limit of open files, with `ulimit -n`",
    errno.EFBIG: "raise the limit of the size of files, with `ulimit -f`",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_TRACE_HINT = "`-vv` shows where it happened"


Failure = tuple[str, str, int]
"""What is wrong, with the values; what to do about it; what the process exits with."""


def run(command: click.Command, args: Sequence[str] | None) -> int:
    """Run a command and return its exit code; errors are told on stderr."""
    _open_closed_streams()
    start_logging()
    _allow_any_text()
    words = set(sys.argv[1:] if args is None else args)
    as_json = "--json" in words and not words & {"-q", "--quiet"}
    try:
        # Verbs return nothing; click returns the code of `context.exit(code)`, and is
        # quiet itself when nobody reads stdout any more.
        code = command.main(args, prog_name="kvstore", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as error:
        # In place of Ctrl-C, click raises its own.
        stop = error.__cause__ or error
        hint = getattr(stop, "hint", "the same command goes on from what is kept")
        print_failure("interrupted", hint, INTERRUPTED, as_json=as_json)
        return INTERRUPTED
    except Exception as error:
        message, hint, exit_code = explain(error)
        log.debug("where it happened:", exc_info=error)
        print_failure(message, hint, exit_code, as_json=as_json)
        return exit_code
    return code or 0


def explain(error: Exception) -> Failure:
    """Return what to tell a person of an error."""
    match error:
        case KVStoreError():
            return str(error), error.hint or _TRACE_HINT, error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.message)
            return "no verb is given", "`kvstore -h` lists them", USAGE
        case click.UsageError():
            return _explain_usage(error)
        case click.ClickException():
            return _own_style(error.format_message()), _TRACE_HINT, 1
        case OSError():
            return _explain_os(error)
        case ValueError():
            return str(error), _TRACE_HINT, 1
        case ImportError() if "libmlx" in str(error):
            return f"MLX has no back end: {error}", BACK_END_REMEDY, 1
        case MemoryError():
            return "out of memory", "close other programs, or save less", 1
    message = f"internal error: {type(error).__name__}: {error}"
    return message, "run it again with `-vv` and report what it prints", 1


def _explain_usage(error: click.UsageError) -> Failure:
    path = error.ctx.command_path if error.ctx else "kvstore"
    guesses = getattr(error, "possibilities", None) or ()
    hint = getattr(error, "hint", f"`{path} -h` shows how it is used")
    message = error.message if guesses else error.format_message()
    if isinstance(error, click.NoSuchOption):
        # With its guesses, click's message has two sentences.
        message = f"no such option `{error.option_name}`"
    if guesses:
        hint = "did you mean " + " or ".join(f"`{guess}`" for guess in guesses) + "?"
    return _own_style(message), hint, USAGE


def _explain_os(error: OSError) -> Failure:
    hint = _HINTS.get(error.errno or 0, _TRACE_HINT)
    if error.strerror is None:
        return str(error), hint, 1
    where = f": {os.fspath(error.filename)!s}" if error.filename is not None else ""
    return f"{_lower_first(error.strerror)}{where}", hint, 1


def _own_style(message: str) -> str:
    """Return a message of click's in our style."""
    quoted = re.sub(r"'([^']*)'", r"`\1`", message.rstrip("."))
    # What a path is to be stands behind the name of the option.
    quoted = re.sub(r"(?<=: )(File|Directory|Path)(?= `)", _lowered, quoted)
    return _lower_first(quoted)


def _lowered(match: re.Match[str]) -> str:
    return match[0].lower()


def _lower_first(text: str) -> str:
    """Return a sentence with a small letter first, but leave `I/O` alone."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _open_closed_streams() -> None:
    """Give files that are opened later no number of a standard stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The system takes the lowest number, which is the stream's own.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _allow_any_text() -> None:
    """Print what a terminal cannot show as escapes, instead of failing halfway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
