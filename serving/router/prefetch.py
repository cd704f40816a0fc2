"""A new version goes to the replica that will be asked about it, before anybody asks: told by `serving.router.jobs`."""

import logging

from ray.serve.handle import DeploymentHandle

from memory_worker.manifest import Manifest
from memory_worker.recall.groups import segment_groups
from serving.config import Profile

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id


class Prefetch:
    """Has the Recaller replica that a version's questions are routed to bring its segments to that node."""

    def __init__(self, recaller: DeploymentHandle, profile: Profile) -> None:
        self._recaller = recaller
        self._group_slots = profile.memory.group_slots
        self._asleep = profile.pools.memory.min_replicas == 0  # not woken for memories that nobody may ask about

    async def __call__(self, manifest: Manifest) -> None:
        """Never raises: the first question loads what could not be prefetched."""
        if self._asleep:
            return
        for group in segment_groups([manifest], self._group_slots):
            try:
                await self._recaller.options(session_id=group.name).prefetch.remote(group)
            except Exception as error:  # noqa: BLE001  a boundary: see above
                logger.warning("%s is not prefetched: %r", group.name, error)
