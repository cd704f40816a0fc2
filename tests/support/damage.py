"""Damage to what a running server has stored."""

from pathlib import Path

import psutil

from tests.support.server import Server


def forget(server: Server) -> None:
    """Empties the nodes' caches, which hold slots by their digest: the actors are killed, and come back."""
    keepers = [
        process
        for process in server.processes()
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MemoryKeeper")
    ]
    for keeper in keepers:
        keeper.kill()
    psutil.wait_procs(keepers)


def flip(server: Server, path: str) -> Path:
    """Changes one byte in the middle of a stored file."""
    file = server.storage / "memories" / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file
