"""The application graph, and a server of it: Ray, Ray Serve and the actors that keep memories.

`build` is what every way of deploying shares; `deploy` is what `memorag up` runs.
"""

import hashlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memory_worker.models import embedded, smollm2
from serving.config import APPLICATION, EMBEDDED, Profile, ProfileError, load_profile
from serving.deploy.local_ray import new_ray_folder, start_ray, stop_ray

if TYPE_CHECKING:  # Ray reads its environment when it is imported: `start_ray` sets that first
    from ray.serve import Application

    from cluster.config import EngineConfig
    from cluster.pools.placement import ReplicaNeed
    from serving.deploy.daemon import ServerOptions


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    address: str  # http://host:port
    ray_folder: Path | None  # of a Ray that was started here

    def redeploy(self, options: "ServerOptions") -> None:
        """Takes up the profile of `options` replica by replica. Raises `ProfileError` for one that cannot be used.

        What Ray itself was started with stays as it is: the settings under `ray`.
        """
        profile = load_profile(options.profile)
        require_safe(profile, options.host)
        require_nodes(profile)
        _run(resolve_models(profile), options.storage)

    def stop(self) -> None:
        """Ends Serve and, where it was started here, Ray, with all that they left on disk."""
        import ray
        from ray import serve

        from memory_worker.catalog.actor import end_actors

        serve.shutdown()
        if self.ray_folder is None:  # the cluster lives on
            end_actors(ray.get_runtime_context().namespace)
        _leave_ray(self.ray_folder)


def deploy(
    profile: Profile,
    storage: str,
    host: str,
    port: int,
    *,
    ray_folder: Path | None = None,
    say: Callable[[str], None] = logger.info,
) -> RunningServer:
    """Starts a server and returns when every deployment is ready.

    `storage` is a folder or a `pyarrow.fs` URI; port 0 takes a free one. `ray_folder` is where a local Ray keeps
    its sockets and logs; none makes a temporary one. `say` is told when a model is made first.
    """
    require_safe(profile, host)
    profile = resolve_models(profile, say)
    if profile.ray.address == "local":
        ray_folder = ray_folder or new_ray_folder()
        start_ray(profile.ray, ray_folder)
    else:
        import ray

        ray.init(address=profile.ray.address, namespace=profile.ray.namespace)
    from ray import serve

    from cluster.ray_internals import wait_for_proxies

    wait_for_proxies()
    port = port or _free_port(host)
    running = RunningServer(f"http://{host}:{port}", ray_folder if profile.ray.address == "local" else None)
    try:
        require_nodes(profile)
        _require_no_other()
    except BaseException:
        _leave_ray(running.ray_folder)
        raise
    try:
        tracing = profile.ray.tracing
        serve.start(
            http_options={"host": host, "port": port},
            tracing_config={
                "enabled": tracing.enabled,
                "exporter_import_path": tracing.exporter,
                "sampling_ratio": tracing.sampling_ratio,
            },
        )
        _run(profile, storage)
    except BaseException:
        if running.ray_folder:  # in order would take until all has started
            stop_ray(running.ray_folder)
        else:
            running.stop()
        raise
    return running


def _run(profile: Profile, storage: str) -> None:
    from ray import serve

    serve.run(build(profile, memories_root(storage)), name=APPLICATION, route_prefix="/")


def require_nodes(profile: Profile) -> None:
    """Raises `placement.PoolUnplaceable` if the cluster lacks the nodes of a pool and adds none by itself."""
    import ray

    from cluster.pools.placement import Node, PoolUnplaceable, require_placeable

    try:
        require_placeable(needs_of(profile), [Node.of(node) for node in ray.nodes() if node["Alive"]])
    except PoolUnplaceable as error:
        if not profile.ray.autoscaling:
            raise
        logger.warning("waiting for the cluster to grow: %s", error)


def needs_of(profile: Profile) -> list["ReplicaNeed"]:
    """What the fewest replicas of each deployment need of the cluster's nodes."""
    from cluster.pools.placement import ReplicaNeed
    from memory_worker.memorize.ranks import rank_share

    pools, generator, ranks = profile.pools, profile.generator.engine, profile.memory.memorize.ranks
    memorizer = ReplicaNeed.of("Memorizer", "memory", pools.memory)
    if ranks > 1:  # its other ranks are actors of their own
        share = rank_share(profile.memory, pools.memory)
        memorizer = replace(memorizer, parts=pools.memory.min_replicas * ranks, resources=share)
    return [
        ReplicaNeed.of("Ingress", "cpu", pools.cpu),
        ReplicaNeed.of("Router", "cpu", pools.cpu),
        memorizer,
        ReplicaNeed.of("Recaller", "memory", pools.memory, profile.memory.engine.ranks),
        ReplicaNeed.of("Embedder", "retrieval", pools.retrieval),
        ReplicaNeed.of("Retriever", "retrieval", pools.retrieval),
        ReplicaNeed.of("Generator", "generator", pools.generator, generator.ranks if generator else 1),
    ]


def build(profile: Profile, storage_root: str) -> "Application":
    """The Serve application of `profile`, whose models are folders or hub names (see `resolve_models`)."""
    from generator_worker.generator import generator_application
    from memory_worker.memorize.memorizer import memorizer_application
    from memory_worker.recall.application import recaller_application
    from retrieval_worker.retriever import retrieval_applications
    from serving.http.ingress import ingress_deployment
    from serving.router.router import router_deployment
    from serving.router.secret import server_secret

    pools, memory = profile.pools, profile.memory
    _, retriever = retrieval_applications(profile.retrieval, pools.retrieval, storage_root=storage_root)
    secret = server_secret(storage_root)
    router = router_deployment(profile).bind(
        profile,
        storage_root,
        secret,
        limits_of(profile),
        memorizer_application(memory, pools.memory, storage_root),
        recaller_application(
            memory,
            pools.memory,
            storage_root=storage_root,
            namespace=profile.ray.namespace,
            secret=secret,
        ),
        retriever,
        generator_application(profile.generator, pools.generator),
    )
    return _finish(ingress_deployment(profile, storage_root).bind(router), profile)


def _finish(application: "Application", profile: Profile) -> "Application":
    """`application`, its deployments with versions, and with logs as the profile has them.

    A version is made of a deployment's arguments, the Ingress's also of the profile: what is as it was keeps running.
    Left to itself, Serve takes every deployment of a second `serve.run` for a new one, and replaces them all.
    """
    from ray.serve import Application

    bound = [application]
    for each in bound:
        deployment = each._bound_deployment
        named = {str(i): argument for i, argument in enumerate(deployment.init_args)} | deployment.init_kwargs
        plain = {name: value for name, value in named.items() if not isinstance(value, Application)}
        settings = repr(profile) if each is application else ""
        deployment._version = hashlib.sha256(f"{plain!r} {settings}".encode()).hexdigest()[:16]
        logging_config = dict(deployment._deployment_config.logging_config or {})
        deployment._deployment_config.logging_config = logging_config | {"encoding": profile.ray.logs.upper()}
        bound += [argument for argument in named.values() if isinstance(argument, Application)]
    return application


def require_safe(profile: Profile, host: str) -> None:
    """Raises `ProfileError` where anybody on the network could call a server that asks for no key."""
    if profile.auth.mode == "off" and not _is_loopback(host):
        raise ProfileError(
            f"auth.mode is off, which is for loopback only, but {host} can be reached from elsewhere: set auth.mode to "
            "keys and make one with 'memorag keys create TENANT', or listen at 127.0.0.1"
        )


def resolve_models(profile: Profile, say: Callable[[str], None] = logger.info) -> Profile:
    """`profile` with the models that come with the project or in a package named by their folders.

    That of `smollm2` is made first where it is not there yet, which takes half a minute; `say` is told. Raises
    `ProfileError` for a folder that is not there, `ModelUnavailable` where a model cannot be made.
    """
    engines = [engine for engine in (profile.memory.engine, profile.generator.engine) if engine]
    for engine in engines:
        if Path(engine.model).is_absolute() and not Path(engine.model).is_dir():
            raise ProfileError(f"the model folder {engine.model} is not there; correct the engine's `model`")
    folders: dict[str, Path] = {}
    if any(engine.model == EMBEDDED for engine in engines):
        folders[EMBEDDED] = embedded.FOLDER
    if any(engine.model == smollm2.NAME for engine in engines):
        folders[smollm2.NAME] = smollm2.prepare_smollm2(say=say)
    if not folders:
        return profile

    def place(engine: "EngineConfig") -> "EngineConfig":
        return engine.model_copy(update={"model": str(folders.get(engine.model, engine.model))})

    memory, generator = profile.memory, profile.generator
    memory = memory.model_copy(update={"engine": place(memory.engine)})
    if generator.engine:
        generator = generator.model_copy(update={"engine": place(generator.engine)})
    return profile.model_copy(update={"memory": memory, "generator": generator})


def limits_of(profile: Profile) -> tuple[str, ...]:
    """What every answer has to say of the models: `embedded-model` where one knows chronicles alone."""
    engines = [engine for engine in (profile.memory.engine, profile.generator.engine) if engine]
    return ("embedded-model",) if any(embedded.knows_chronicles_only(engine.model) for engine in engines) else ()


def memories_root(storage: str) -> str:
    """The storage root of memories: a URI as it is, or a folder below a local one."""
    return storage if "://" in storage else str(Path(storage).resolve() / "memories")


def _require_no_other() -> None:
    """Raises `ProfileError` if a server of this kind runs on the cluster: two would share one catalog."""
    from ray import serve

    if APPLICATION in serve.status().applications:
        raise ProfileError(
            f"the Ray cluster runs an application {APPLICATION!r} already: end it with 'memorag down' where it was "
            "started, or use another cluster"
        )


def _leave_ray(folder: Path | None) -> None:
    import ray

    if folder:
        stop_ray(folder)
    else:
        ray.shutdown()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # any other name may mean any address


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
