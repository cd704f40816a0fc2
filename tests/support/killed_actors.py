"""Killing actors so that what follows is surely answered by their successors."""

import os
from typing import Any

import ray


def kill_and_await_restart(actor: Any) -> None:
    """`ray.kill` returns at once, and calls may still reach the dying process."""
    before = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    ray.kill(actor, no_restart=False)
    while ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) == before:
        pass
