"""The verb that makes an empty store: init."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import KVStoreError
from ..main import Verb, chosen_path, open_store, output_of
from ..options import option

if TYPE_CHECKING:
    from ...format.documents import JSON


@click.command(cls=Verb)
@option(
    "--encrypt",
    help="Encrypt all that is kept, under a passphrase unless an option below says"
    " otherwise.",
)
@option(
    "--key-file FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the key in this new file, elsewhere than the store.",
)
@option("--keychain", help="Keep the key in the system's keychain.")
@option(
    "--recipient AGE1...",
    help="Keep the key for whoever has the identity of this age recipient.",
)
@click.pass_context
def init(
    context: click.Context,
    encrypt: bool,
    key_file: Path | None,
    keychain: bool,
    recipient: str | None,
) -> None:
    """Make an empty store; other verbs do so too where there is none.

    With `--encrypt`, nobody reads tokens, names or rows without the key: whoever loses
    the key has lost the data, and to delete the key is to delete the data. Its
    passphrase is asked for, or read from $KVSTORE_PASSPHRASE. How many entries and
    blocks there are, their sizes and times, and what was calibrated, can still be seen.
    """
    output = output_of(context)
    ways = [key_file is not None, keychain, recipient is not None]
    if sum(ways) > 1 or (any(ways) and not encrypt):
        raise click.UsageError(
            "`--key-file`, `--keychain` and `--recipient` exclude each other, and go"
            " with `--encrypt`",
            context,
        )
    path = chosen_path(context)
    from ...storage.folder import create_folder, is_store

    there_is_one = KVStoreError(
        f"there is a store already: {path}",
        hint="`--store DIR` chooses another folder; entries move by bundles",
    )
    if is_store(path):
        raise there_is_one
    if encrypt:
        encryption = _encryption(key_file, keychain, recipient)
        try:
            # Another process may have made it while the passphrase was typed.
            made = create_folder(path, encryption=encryption)
            if made.config.encryption != encryption:
                raise there_is_one
        finally:
            if key_file is not None and not is_store(path):
                key_file.unlink()  # the folder was refused, and nothing needs it
    store = open_store(context, create=True)
    method = (store.config.encryption or {}).get("method")
    how = f", encrypted: the key is kept by {_WAYS[method]}" if method else ""
    data: JSON = {"path": str(store.path), "encrypted_by": method}
    output.result(f"made a store{how}: {store.path}", data, [str(store.path)])
    if encrypt:
        output.hint("keep the key, or the passphrase: without it the data is lost")


_WAYS = {
    "passphrase": "a passphrase",
    "file": "a file",
    "keychain": "the keychain",
    "age": "an age recipient",
}


def _encryption(key_file: Path | None, keychain: bool, recipient: str | None) -> JSON:
    from ...storage import vault

    key = vault.new_key()
    if key_file is not None:
        try:
            return vault.keep_by_file(key, key_file)
        except FileExistsError as error:
            raise KVStoreError(
                f"there is a file already: `{key_file}`", hint="choose another"
            ) from error
    if keychain:
        return vault.keep_by_keychain(key)
    if recipient is not None:
        return vault.keep_by_recipient(key, recipient)
    passphrase = os.environ.get("KVSTORE_PASSPHRASE")
    if not passphrase and not sys.stdin.isatty():
        raise KVStoreError(
            "no passphrase was given, and nobody is there to be asked",
            hint="`$KVSTORE_PASSPHRASE` gives it, and `--key-file` needs none",
        )
    passphrase = passphrase or click.prompt(
        "new passphrase", hide_input=True, confirmation_prompt=True, err=True
    )
    return vault.keep_by_passphrase(key, passphrase)
