"""What several commands take, each declared once. Imported when the command line starts: nothing heavy here."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.cli.show import Output

Storage = Annotated[
    Path,
    typer.Option(
        help="Folder of the server on this machine.",
        envvar="MEMORAG_STORAGE",
        show_default="~/.memorag",
        callback=lambda folder: folder.expanduser().resolve(),
    ),
]
STORAGE = Path("~/.memorag")
ProfileName = Annotated[str, typer.Option("--profile", help="Name of a profile, or a YAML file.")]
_DEFAULT_URL = "http://127.0.0.1:8000"


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """A command with --json, of which its first parameter, `out`, is made."""

    def run(
        *, as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")] = False,
        **given: Any,
    ) -> None:  # fmt: skip
        command(Output(as_json), **given)

    return _add_options(run, command, made=1)


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """A command that asks a server: `with_output`, with --storage and --url, of which its second, `client`, is made."""

    def run(
        out: Output,
        *,
        storage: Storage = STORAGE,
        url: Annotated[
            str | None,
            typer.Option(help="Address of the server; otherwise that of --storage.", envvar="MEMORAG_URL"),
        ] = None,
        **given: Any,
    ) -> None:
        from serving.client.client import MemoRAG
        from serving.deploy.daemon import state_of

        if url is None:
            state = state_of(storage)
            url = (state.address if state else None) or _DEFAULT_URL
        with MemoRAG(url, os.environ.get("MEMORAG_API_KEY")) as client:
            command(out, client, **given)

    return with_output(_add_options(run, command, made=2))


def _add_options(run: Callable[..., None], command: Callable[..., None], *, made: int) -> Callable[..., None]:
    """`run`, seen by Typer with the parameters of `command` that it does not make, and its own options behind them."""
    own = list(inspect.signature(command).parameters.values())[made:]
    *options, _ = inspect.signature(run).parameters.values()
    passed = [each for each in options if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in [*own, *options[len(passed) :]]]
    # Where Typer looks for them.
    run.__signature__ = inspect.Signature([*passed, *named])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in [*passed, *named]}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
