"""`memorag keys`: make, list and revoke API keys of a storage root, whether or not a server runs on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.options import with_output
from serving.cli.show import Commands, Output

if TYPE_CHECKING:
    from serving.http.keys import KeyEntry, KeyFile

app = typer.Typer(
    cls=Commands,
    help="Make, list and revoke API keys. A running server sees a change within seconds.",
    no_args_is_help=True,
)

# Unlike elsewhere it may be a URI: keys belong to the storage, whether or not a server runs on it.
Storage = Annotated[
    str, typer.Option(help="Folder or URI of the server's storage.", envvar="MEMORAG_STORAGE", show_default=True)
]
_STORAGE = "~/.memorag"


@app.command()
@with_output
def create(
    out: Output,
    tenant: Annotated[str, typer.Argument(help="Whom the key is for; a new name is a new tenant.")],
    note: Annotated[str, typer.Option(help="What it is used for, for people.")] = "",
    storage: Storage = _STORAGE,
) -> None:
    """Make a key, and show it: the only time that it can be seen."""
    key = _key_file(storage).create(tenant, note)
    out.result({"id": key.split("_")[1], "tenant": tenant, "note": note, "key": key}, key)
    out.note("this key is shown only now: keep it where only its user can read it")


@app.command("list")
@with_output
def list_keys(out: Output, storage: Storage = _STORAGE) -> None:
    """List the keys there are: ids, tenants, when they were made, notes."""
    entries = _key_file(storage).entries()
    if out.as_json:
        out.result({"keys": [_describe(entry) for entry in entries]}, "")
    elif not entries:
        out.note("no keys yet; make one with: memorag keys create TENANT")
    else:
        width = max(len(entry.tenant) for entry in entries)
        lines = (f"{e.id}  {e.tenant:<{width}}  {e.created[:19]}  {e.note}".rstrip() for e in entries)
        out.result(None, "\n".join(lines))


@app.command()
@with_output
def revoke(
    out: Output,
    id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the part after 'mr_'.")],
    storage: Storage = _STORAGE,
) -> None:
    """Revoke a key: requests with it are refused within seconds."""
    entry = _key_file(storage).revoke(id)
    out.result({"revoked": _describe(entry)}, f"revoked {entry.id} of {entry.tenant}")


def _key_file(root: str) -> "KeyFile":
    from cluster.storage.durable import Storage as StorageRoot
    from serving.deploy.app import memories_root
    from serving.http.keys import KeyFile

    return KeyFile(StorageRoot(memories_root(root if "://" in root else str(Path(root).expanduser()))))


def _describe(entry: "KeyEntry") -> dict[str, Any]:
    return entry.model_dump(exclude={"sha256"})
