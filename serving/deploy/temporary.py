"""A server of its own for those who measure one: in a temporary folder, and gone with the measurement."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serving.config import Profile
from serving.deploy.app import deploy
from serving.deploy.local_ray import new_ray_folder

T = TypeVar("T")


def measure_on_server(profile: Profile, measure: Callable[[str, str], Awaitable[T]]) -> T:
    """What `measure` returns, called with the address and the storage folder of a server of that profile.

    The server ends before the event loop that `measure` runs on: handles belong to that. Its storage lies in the folder
    that goes with its Ray, however this process ends.
    """
    folder = new_ray_folder()
    try:
        storage = str(folder / "storage")
        server = deploy(profile, storage, "127.0.0.1", 0, ray_folder=folder)

        async def run() -> T:
            try:
                return await measure(server.address, storage)
            finally:
                server.stop()

        return asyncio.run(run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
