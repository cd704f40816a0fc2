"""Joining the Ray cluster of a running server, for those who ask it without HTTP."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import MessageError


class NotAttached(MessageError):
    """There is no cluster to join; the message says why and what to do."""


@contextmanager
def attached(storage: str | Path | None, address: str | None) -> Iterator[None]:
    """Connects this process to a server's Ray cluster, unless it is connected to one.

    That is the cluster at `address`, or the one of the server which owns the folder `storage` (default
    `$MEMORAG_STORAGE`, else ~/.memorag). Raises `NotAttached`.
    """
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield
            return
    options: dict[str, Any] = {"address": address}
    if address is None:
        from serving.config import load_profile
        from serving.deploy.daemon import state_of
        from serving.deploy.local_ray import address_in

        folder = Path(storage or os.environ.get("MEMORAG_STORAGE", "~/.memorag")).expanduser().resolve()
        state = state_of(folder)
        if state is None or state.process() is None or state.address is None:
            raise NotAttached(
                f"no server runs on {folder}; start one with 'memorag up', name its folder with --storage, or give "
                "the address of its Ray cluster"
            )
        options = {"address": load_profile(state.profile).ray.address}
        if options["address"] == "local":
            if "ray" in sys.modules:
                raise NotAttached("Ray is imported already, and would not see its token: call this before importing it")
            options = {"address": address_in(Path(state.temporary)), "_node_ip_address": "127.0.0.1"}
    import ray

    try:
        ray.init(**options, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise NotAttached(f"the Ray cluster at {options['address']} cannot be reached: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
