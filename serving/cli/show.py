"""How the command line shows things: JSON for machines, colour and bars on a terminal, plain lines otherwise."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from cluster.errors import ExpectedError

if TYPE_CHECKING:
    from serving.client.client import Event
    from serving.deploy.doctor import Check

_SHOWN_PASSAGES = 5
_PASSAGE_CHARACTERS = 300
_TABLE_WIDTH = 140  # off a terminal
_CLUE_KINDS = {"span": "span", "question": "question", "draft": "draft answer", "key_point": "key point"}
DEGRADED = {
    "embedded-model": "the embedded model knows generated chronicles only; of other texts its words are noise; "
    "passages and evidence are real",
    "text-cut": "the text did not fit the generator's window: its middle was left out",
    "recall": "no clues could be recalled in time: this is plain retrieval with the question alone",
}
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "ready": "green", "memorizing": "yellow", "failed": "red"}


class Commands(TyperGroup):
    """A family of commands. An expected error in any of them is one message and exit code 1; a bug shows its stack."""

    def invoke(self, ctx: Any) -> Any:
        out = Output(as_json=False)
        with out.interruptible("interrupted"):
            try:
                return super().invoke(ctx)
            except (ExpectedError, OSError) as error:
                out.error(str(error))
                raise typer.Exit(1) from None


class Output:
    """Where one command writes. With `as_json`, stdout gets one JSON value and nothing else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # Off a terminal lines are not wrapped, so that they can be searched and cut.
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.on_terminal = self._err.is_terminal and self._out.is_terminal

    def result(self, value: Any, line: str) -> None:
        """What was asked for: `value` as JSON, or `line`."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False, indent=1), flush=True)
        else:
            print(line, flush=True)

    def note(self, line: str) -> None:
        """Something beside the result."""
        self._err.print(Text(line, style="dim"))

    def error(self, line: str) -> None:
        """Why the command could not be done."""
        self._err.print(Text("error: ", style="bold red"), Text(line), sep="")

    @contextmanager
    def interruptible(self, meaning: str) -> Iterator[None]:
        """An interrupt of the block is exit code 130, with what that means."""
        try:
            yield
        except KeyboardInterrupt:
            self.error(meaning)
            raise typer.Exit(130) from None

    @contextmanager
    def waiting(self, line: str) -> Iterator[Callable[[str], None]]:
        """A spinner, or lines, while the block runs; call what is yielded with what is being waited for."""
        if self._err.is_terminal:
            with self._err.status(line) as spinner:
                yield lambda detail: spinner.update(f"{line}: {detail}")
        else:
            self.note(line)
            yield self.note

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Names and values."""
        if self.as_json:
            self.result(facts, "")
            return
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            shown = f"{value:,}" if type(value) is int and name != "pid" else str(value)
            self._print(Text(f"{name:<{width}}  ", style="bold"), Text(shown, style=_COLOURS.get(shown, "")))

    def table(self, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Rows, with the columns of the first."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for column in rows[0] if rows else ():
            table.add_column(column, justify="left" if column in ("figure", "method") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        Console(highlight=False, width=None if self.on_terminal else _TABLE_WIDTH).print(table)

    def memory(self, info: Mapping[str, Any]) -> None:
        """One memory."""
        if self.as_json:
            self.result(info, "")
            return
        documents = ", ".join(f"{d['id']} ({d['characters']:,} characters)" for d in info["documents"])
        self.facts({k: v for k, v in info.items() if v is not None and k != "documents"} | {"documents": documents})

    def memories(self, infos: list[dict[str, Any]]) -> None:
        """Many memories."""
        if self.as_json:
            self.result({"memories": infos}, "")
        elif not infos:
            self.note("no memories yet; make one with: memorag memorize FILE")
        for info in infos if not self.as_json else []:
            state = str(info["status"])
            sizes = f"  {info['tokens']:,} tokens  {info['slots']:,} slots  {info['passages']:,} passages  "
            shown = Text(state, style=_COLOURS.get(state, ""))
            self._print(Text(info["id"], style="bold"), "  ", shown, sizes, info.get("title") or "")

    def checks(self, checks: "list[Check]") -> None:
        """What the doctor found."""
        if self.as_json:
            self.result({"checks": [asdict(check) for check in checks]}, "")
            return
        width = max(len(check.name) for check in checks)
        for check in checks:
            self._print(
                Text(f"{check.state:<4}", style=_COLOURS[check.state]), f"  {check.name:<{width}}  {check.found}"
            )
            if check.fix:
                self._print(Text(f"      {'':<{width}}  fix: {check.fix}", style="yellow"))

    def stream(self, events: "Iterable[Event]") -> None:
        """An answer as its parts come, then what only the end knows."""
        part = ""
        for event in events:
            if event.name in ("clue", "passage", "token") and event.name != part:
                part = event.name
                self._print_heading({"clue": "Clues", "passage": "Passages", "token": "Answer"}[part])
                shown = 0
            if event.name == "clue":
                self._clue(event.data)
            elif event.name == "passage":
                shown += 1
                self._passage(shown, event.data)
            elif event.name == "token":
                self._out.print(Text(event.data["text"]), end="")
            elif event.name == "done":
                self._print()
                self._end(event.data)

    def answer(self, answer: Mapping[str, Any]) -> None:
        """A whole answer."""
        if self.as_json:
            self.result(answer, "")
            return
        from serving.client.client import Event

        parts = [("clue", clue) for clue in answer["clues"]] + [("passage", each) for each in answer["passages"]]
        parts += [("token", {"text": answer["answer"]}), ("done", answer)]
        self.stream(Event(name, data) for name, data in parts)

    def _end(self, answer: Mapping[str, Any]) -> None:
        if answer["citations"]:
            self._print_heading("Citations")
        for citation in answer["citations"]:
            self._print(Text(f"  [{citation['n']}] {_place(citation)}"))
        if answer["evidence"]:
            self._print_heading("Evidence")
        for evidence in answer["evidence"]:
            place = Text(f"  {_place(evidence)}  {evidence['score']:.3f}  ", style="dim")
            self._print(place, Text(_short(evidence["text"])))
        for note in answer["degraded"]:
            self._print()
            self._print(Text("Note: ", style="bold yellow"), DEGRADED.get(note, f"degraded: {note}"))
        timings = answer["timings_ms"]
        stages = ", ".join(f"{stage} {timings[stage]:.0f} ms" for stage in ("recall", "retrieve", "generate", "total"))
        self._print()
        self._print(Text(stages, style="dim"))

    def _print_heading(self, title: str) -> None:
        self._print()
        self._print(Text(title, style="bold cyan"))

    def _clue(self, clue: Mapping[str, Any]) -> None:
        self._print(Text(f"  {_CLUE_KINDS.get(clue['kind'], clue['kind'])}: ", style="magenta"), Text(clue["text"]))

    def _passage(self, number: int, passage: Mapping[str, Any]) -> None:
        """The first few passages with their text, the others with their place."""
        place = Text(f"  [{number}] {_place(passage)}  {passage['score']:.4f}  ", style="dim")
        self._print(place, Text(_short(passage["text"]) if number <= _SHOWN_PASSAGES else ""))

    def _print(self, *parts: str | Text) -> None:
        self._out.print(*(part if isinstance(part, Text) else Text(part) for part in parts), sep="")


def _place(item: Mapping[str, Any]) -> str:
    return f"{item['document']} {item['start']}-{item['end']}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PASSAGE_CHARACTERS else line[: _PASSAGE_CHARACTERS - 1] + "…"
