"""The command line `memorag`. Each command is a thin skin over the client, the daemon or the doctor.

What was asked for goes to stdout (`--json`: as one JSON value), all else to stderr. Expected errors are one line
with what to do, and exit code 1; wrong usage is exit code 2. Heavy modules are imported inside the commands.
"""

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.planning.costs import MemoryKind
from serving.cli.batch import batch, memorize_folder
from serving.cli.evaluate import evaluate
from serving.cli.keys import app as keys_app
from serving.cli.options import STORAGE, ProfileName, Storage, with_client, with_output
from serving.cli.plan import calibrate, plan
from serving.cli.show import DEGRADED, Commands, Output
from serving.cli.status import status
from serving.cli.train import app as train_app

if TYPE_CHECKING:
    from serving.client.client import MemoRAG

app = typer.Typer(
    cls=Commands,
    help="MemoRAG serving: texts become memories, and questions are answered from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
memories_app = typer.Typer(cls=Commands, help="List the memories of a server; show or delete one.")
app.add_typer(memories_app, name="memories")
documents_app = typer.Typer(
    cls=Commands, help="Add, replace and delete the documents of a memory.", no_args_is_help=True
)
app.add_typer(documents_app, name="documents")
app.add_typer(keys_app, name="keys")
app.add_typer(train_app, name="train")
app.command()(status)
app.command()(batch)
app.command()(calibrate)
app.command()(evaluate)
app.command()(plan)

MemoryId = Annotated[str, typer.Argument(metavar="ID", help="The memory's id.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of the answer at most.")]
LanguageOption = Annotated[Literal["en", "zh"] | None, typer.Option(help="Language of the prompts; else the text's.")]
Stream = Annotated[
    bool | None, typer.Option("--stream/--no-stream", help="Show parts as they come; default on a terminal.")
]
Task = Literal["memorag", "memory", "rag", "summarize", "full", "hyde", "rewrite"]


@app.command()
@with_output
def up(
    out: Output,
    profile: ProfileName = "embedded",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    storage: Storage = STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until interrupted.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without progress until it is given up.")] = 600.0,
) -> None:
    """Start a server on this machine; return when it is ready, with its address."""
    from serving.config import load_profile
    from serving.deploy import daemon

    load_profile(profile)  # a mistake in it is said here, not in the server's log
    profile = str(Path(profile).resolve()) if Path(profile).is_file() else profile
    options = daemon.ServerOptions(profile, str(storage), host, port)
    if foreground:
        daemon.require_free_port(host, port)
        daemon.run_server(options, on_ready=lambda address: out.result({"address": address}, address))
        return
    begun = time.monotonic()
    with out.waiting("starting the server") as wait:
        state, started = daemon.start(options, timeout_s=timeout, on_wait=wait)
    if started:
        out.note(f"ready in {time.monotonic() - begun:.0f} s; log: {storage / 'server.log'}")
    else:
        out.note(f"{storage} is already served, with profile {state.profile}")
    if state.profile == "embedded":
        out.note(DEGRADED["embedded-model"])
    facts = {"address": state.address, "profile": state.profile, "pid": state.pid, "storage": str(storage)}
    out.result(facts | {"started": started}, str(state.address))


@app.command()
@with_output
def down(out: Output, storage: Storage = STORAGE) -> None:
    """End the server of a storage folder, with all its processes and temporary files. Memories stay."""
    from serving.deploy import daemon

    with out.waiting("stopping the server"):
        stopped = daemon.stop(storage)
    out.result({"stopped": stopped}, "stopped" if stopped else f"no server was running on {storage}")


@app.command()
@with_client
def memorize(
    out: Output,
    client: "MemoRAG",
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", exists=True, help="txt, md, html, pdf, docx; or a folder of such."),
    ],
    id: Annotated[str | None, typer.Option(help="Id of the memory; otherwise the server chooses.")] = None,
    title: Annotated[str | None, typer.Option(help="Title for people.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to ask it by, with others; may be repeated.")] = None,
    kind: Annotated[
        MemoryKind | None, typer.Option(help="Kind of memory; otherwise the profile's, or what the model can make.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Tokens per slot; otherwise the profile's.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="A memory of each file below a folder.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="With --recursive: files under way at most.")] = 4,
) -> None:
    """Make one memory of files, or one of each file below a folder, and wait until all is ready."""
    if recursive and (id or title):
        raise typer.BadParameter("--recursive makes many memories, with ids and titles of their files' names")
    if not recursive and (folder := next((path for path in files if path.is_dir()), None)):
        raise typer.BadParameter(f"{folder} is a folder; with --recursive, each file below it becomes a memory")
    if recursive:
        memorize_folder(out, client, files, concurrency=concurrency, tags=tag or (), kind=kind, ratio=ratio)
        return
    memory = client.memorize(*files, id=id, title=title, tags=tag or (), kind=kind, ratio=ratio, progress=True)
    out.memory(memory.info)


@app.command()
@with_client
def ask(
    out: Output,
    client: "MemoRAG",
    id: MemoryId,
    question: Annotated[str, typer.Argument(help="In the language of the text.")],
    task: Annotated[
        Task, typer.Option(help="memory: no passages; rag: no clues; full, hyde, rewrite: without memory.")
    ] = "memorag",
    max_tokens: MaxTokens = None,
    language: LanguageOption = None,
    stream: Stream = None,
) -> None:
    """Answer a question from a memory, with clues, passages, evidence and timings."""
    asked = partial(client.memory(id).ask, question, task, max_tokens=max_tokens, language=language)
    _show_answer(out, stream, asked)


@app.command()
@with_client
def summarize(
    out: Output,
    client: "MemoRAG",
    id: MemoryId,
    max_tokens: MaxTokens = None,
    language: LanguageOption = None,
    stream: Stream = None,
) -> None:
    """Summarize a memory."""
    _show_answer(out, stream, partial(client.memory(id).summarize, max_tokens=max_tokens, language=language))


@memories_app.callback(invoke_without_command=True)
@with_client
def memories(out: Output, client: "MemoRAG", context: typer.Context) -> None:
    """List the memories of a server."""
    if context.invoked_subcommand:
        return
    out.memories([memory.info for memory in client.memories()])


@memories_app.command("show")
@with_client
def memories_show(out: Output, client: "MemoRAG", id: MemoryId) -> None:
    """Show one memory."""
    out.memory(client.memory(id).info)


@memories_app.command("cancel")
@with_client
def memories_cancel(out: Output, client: "MemoRAG", id: MemoryId) -> None:
    """Cancel what is being made of a memory."""
    client.memory(id).cancel()
    out.result({"cancelled": id}, f"cancelled the job of {id}")


@memories_app.command("delete")
@with_client
def memories_delete(out: Output, client: "MemoRAG", id: MemoryId) -> None:
    """Delete one memory."""
    client.delete(id)
    out.result({"deleted": id}, f"deleted {id}")


@app.command("export")
@with_client
def export_memory(
    out: Output,
    client: "MemoRAG",
    id: MemoryId,
    file: Annotated[Path, typer.Argument(dir_okay=False, help="Archive to write.")],
) -> None:
    """Write a memory to one file, which any server with the same memory model imports."""
    memory = client.memory(id)
    with out.waiting(f"exporting {id}"):
        memory.export(file)
    size = file.stat().st_size
    out.result({"memory": id, "file": str(file), "bytes": size}, f"wrote {file} ({size:,} bytes)")


@app.command("import")
@with_client
def import_memory(
    out: Output,
    client: "MemoRAG",
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Archive that export wrote.")],
    id: Annotated[str | None, typer.Option(help="Id of the memory; otherwise that in the archive.")] = None,
) -> None:
    """Make a memory of an archive."""
    with out.waiting(f"importing {file}"):
        memory = client.import_archive(file, id)
    out.memory(memory.info)


@documents_app.command("put")
@with_client
def documents_put(
    out: Output,
    client: "MemoRAG",
    id: MemoryId,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="txt, md, html, pdf or docx.")],
    document: Annotated[str | None, typer.Option("--as", help="Id of the document; otherwise the file's name.")] = None,
    if_match: Annotated[str | None, typer.Option(help="Only if the memory is at this version.")] = None,
) -> None:
    """Add a document to a memory, or replace it, and wait until questions see it."""
    memory = client.memory(id)
    memory.documents.put(document or file.name, path=file, if_match=if_match, progress=True)
    out.memory(memory.info)


@documents_app.command("delete")
@with_client
def documents_delete(
    out: Output,
    client: "MemoRAG",
    id: MemoryId,
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="Id of the document.")],
    if_match: Annotated[str | None, typer.Option(help="Only if the memory is at this version.")] = None,
) -> None:
    """Delete a document from a memory; no question sees it any more."""
    out.memory(client.memory(id).documents.delete(document, if_match=if_match).info)


@app.command()
@with_output
def reload(
    out: Output,
    profile: Annotated[str | None, typer.Option(help="Profile to take up; otherwise its own again.")] = None,
    storage: Storage = STORAGE,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without progress until it is given up.")] = 600.0,
) -> None:
    """Have a running server take up a changed profile, replica by replica, without losing a request."""
    from serving.config import load_profile
    from serving.deploy import daemon

    if profile:
        load_profile(profile)
        profile = str(Path(profile).resolve()) if Path(profile).is_file() else profile
    with out.waiting("reloading"):
        state = daemon.reload(storage, profile, timeout_s=timeout)
    out.result({"profile": state.profile, "address": state.address}, f"reloaded with profile {state.profile}")


@app.command()
@with_output
def doctor(out: Output, storage: Storage = STORAGE, port: int = 8000) -> None:
    """Check this machine and installation; say how to mend what is wrong."""
    from serving.deploy.doctor import examine

    checks = examine(storage, port)
    out.checks(checks)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a command that is asked to end cleans up, as after Ctrl-C
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    app(prog_name="memorag")


def _show_answer(out: Output, stream: bool | None, ask: Callable[..., Any]) -> None:
    if not out.as_json and (out.on_terminal if stream is None else stream):
        out.stream(ask(stream=True))
    else:
        out.answer(ask().raw)


if __name__ == "__main__":
    main()
