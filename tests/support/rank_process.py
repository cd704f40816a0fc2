"""One rank of several, in a process of its own: `python -m tests.support.rank_process MODEL RANK RANKS PORT OUT`.

Runs each of `CASES` with the other ranks at PORT of this machine (rank 0 is given 0, and prints what it took), writes
the slots to OUT, and prints a line of JSON for each case.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from memory_worker.models.beacon import BeaconModel, Exchange, Slots
from memory_worker.models.beacon.exchange import reach_store, serve_store
from tests.support.beacon_reference import VOCABULARY

WINDOW, RATIO, HEAD = 32, 8, 6
# In windows: many and a rest, less than one, exactly one, one token, some. The last passes are ragged.
RAGGED = (WINDOW * 9 + 3, 7, WINDOW, 1, WINDOW * 3)
# Name, tokens of the documents, windows in a pass (also fewer than there are ranks), ratio (none keeps every token).
CASES = (
    ("even", (WINDOW * 16,), 8, RATIO),
    ("ragged", RAGGED, 8, RATIO),
    ("fewer", RAGGED, 3, RATIO),
    ("single", RAGGED, 1, RATIO),
    ("full", RAGGED, 8, None),
)
HOST, TIMEOUT_S = "127.0.0.1", 300.0


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def compressed(
    model: BeaconModel,
    counts: Sequence[int],
    group_windows: int,
    ratio: int | None,
    exchange: Exchange | None = None,
) -> Iterator[list[Slots]]:
    """The slots of documents of so many tokens: what each pass made, by document."""
    head = model.compress(tokens(HEAD, 99), ratio=RATIO, head=HEAD)
    documents = [tokens(count, count) for count in counts]
    for parts in model.compress_documents(
        documents, ratio=ratio, memory=head, group_windows=group_windows, exchange=exchange
    ):
        yield [part.slots for part in parts]


def _written() -> int:
    """Bytes this process has written by system calls, to sockets too."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def main(folder: str, rank: str, ranks: str, port: str, out: str) -> None:
    torch.set_num_threads(1)
    model, number, count = BeaconModel.from_pretrained(folder), int(rank), int(ranks)
    if number == 0:
        store, taken = serve_store(HOST, count, TIMEOUT_S)
        print(taken, flush=True)
    else:
        store = reach_store(HOST, int(port), count, TIMEOUT_S)
    exchange = Exchange(store, number, count, host=HOST, device=torch.device("cpu"), timeout_s=TIMEOUT_S)
    made = {}
    for name, documents, group_windows, ratio in CASES:
        counted, written = exchange.bytes_sent, _written()
        passes = list(compressed(model, documents, group_windows, ratio, exchange))
        facts = {"counted": exchange.bytes_sent - counted, "written": _written() - written}
        print(json.dumps(facts), flush=True)
        slots = Slots.concat([slots for parts in passes for slots in parts])
        made |= {f"{name}.keys": slots.keys, f"{name}.values": slots.values}
    save_file(made, out)
    exchange.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
