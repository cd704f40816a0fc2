"""What several commands take, each declared once. Imported when the command line starts: nothing heavy here."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]
Storage = Annotated[
    Path,
    typer.Option(help="Folder of the server on this machine.", envvar="MEMORAG_STORAGE", show_default="~/.memorag"),
]
STORAGE = Path("~/.memorag")
Url = Annotated[
    str | None,
    typer.Option(help="Address of the server; otherwise that of --storage.", envvar="MEMORAG_URL"),
]
ProfileName = Annotated[str, typer.Option("--profile", help="Name of a profile, or a YAML file.")]
