"""The command ``kvstore``; ``commands`` has its verbs, the rest is what they share.

Nothing here imports mlx-lm before a verb that runs a model is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import adopt as _adopt
from .commands import calibrate as _calibrate
from .commands import chat as _chat
from .commands import demo as _demo
from .commands import doctor as _doctor
from .commands import entries as _entries
from .commands import generate as _generate
from .commands import housekeeping as _housekeeping
from .commands import init as _init
from .commands import keys as _keys
from .commands import listing as _listing
from .commands import lookup as _lookup
from .commands import recompress as _recompress
from .commands import remote as _remote
from .commands import search as _search
from .commands import serve as _serve
from .commands import show as _show
from .commands import transfer as _transfer
from .commands import view as _view
from .failures import run
from .main import cli

for _verb in (
    _generate.save,
    _entries.load,
    _generate.generate,
    _chat.chat,
    _serve.serve,
    _transfer.export,
    _transfer.import_file,
    _init.init,
    _keys.key,
    _remote.remote,
    _remote.push,
    _remote.pull,
    _lookup.lookup,
    _listing.list_entries,
    _entries.inspect_entry,
    _show.show,
    _search.search,
    _housekeeping.rename,
    _adopt.adopt,
    _housekeeping.pin,
    _entries.remove,
    _housekeeping.prune,
    _housekeeping.verify,
    _housekeeping.stats,
    _view.view,
    _calibrate.calibrate,
    _recompress.recompress,
    _doctor.doctor,
    _demo.bench,
    _demo.demo,
    _housekeeping.show_dir,
    _housekeeping.completion,
    _housekeeping.show_help,
):
    cli.add_command(_verb)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Args:
        args: Its arguments; those of the process by default.
    """
    sys.exit(run(cli, args))


__all__ = ["cli", "main"]
