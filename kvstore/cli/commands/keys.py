"""The verb about keys: who signs, who is trusted, and whether a store asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ...storage import keys
from ..main import Verb, VerbGroup, open_store, output_of
from ..options import option
from ..output import Column

if TYPE_CHECKING:
    from ...format.documents import JSON

_POLICIES = ("any", "signed-only")


@click.group("key", cls=VerbGroup, subcommand_metavar="new|show|trust|policy ...")
def key() -> None:
    """Sign what you hand over, and trust the keys of others."""


@key.command("new", cls=Verb)
@click.pass_context
def new(context: click.Context) -> None:
    """Make your key, with which `export --sign` signs.

    It is a file in your folder for configuration that only you can read. Tell its
    public part, which is printed, to those who are to trust you, by a way that nobody
    else can write to.
    """
    public = keys.new_signing_key()
    output_of(context).result(f"your public key: {public}", {"key": public}, [public])


@key.command("show", cls=Verb)
@click.pass_context
def show(context: click.Context) -> None:
    """List your public key, and those that you trust."""
    output_of(context).table(
        list(keys.known_keys().items()),
        [Column("NAME", lambda one: one[1]), Column("KEY", lambda one: one[0])],
        data=lambda one: {"name": one[1], "key": one[0]},
        id_of=lambda one: one[0],
        empty="no keys",
    )


@key.command("trust", cls=Verb)
@click.argument("name", metavar="NAME")
@click.argument("public", metavar="[KEY]", required=False)
@option("--off", help="Trust it no longer.")
@click.pass_context
def trust(context: click.Context, name: str, public: str | None, off: bool) -> None:
    """Trust whoever holds a key, under a name that you give; or no longer.

    What has been taken from a signer whom you trust no longer stays until it is
    removed: `kvstore ls` shows its key in place of the name.
    """
    if (public is None) != off:
        raise click.UsageError("give a key, or `--off`", context)
    output = output_of(context)
    if public is None:
        gone = keys.distrust_signer(name)
        output.result(f"forgot `{name}`: {gone}", {"name": name, "key": gone}, [gone])
        return
    keys.trust_signer(name, public)
    data: JSON = {"name": name, "key": public}
    output.result(f"`{name}` is trusted: {public}", data, [public])


@key.command("policy", cls=Verb)
@click.argument("policy", type=click.Choice(_POLICIES), required=False)
@click.pass_context
def policy(context: click.Context, policy: str | None) -> None:
    """Show or set what a store takes from elsewhere.

    With `signed-only`, an import or a pull is refused unless a key that you trust, or
    your own, signed it. What is in the store already stays.
    """
    store = open_store(context, create=policy is not None)
    if policy is not None:
        store.set_policy(is_signed_only=policy == "signed-only")
    set_now = _POLICIES[store.config.is_signed_only]
    output_of(context).result(set_now, {"policy": set_now}, [set_now])
