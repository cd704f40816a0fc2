"""The Generator deployment: a question and numbered passages in, a streamed answer with citations out.

The Router calls its `generate`, and its `stats` for `/readyz`. `Generator` (local.py) has a vLLM
engine of our own, `RemoteGenerator` (remote.py) asks an endpoint; both have the same methods.
"""

from ray import serve
from ray.serve import Application

from cluster.engine import engine_application
from cluster.pools.pools import PoolConfig
from generator_worker.config import GeneratorConfig


def generator_application(config: GeneratorConfig, pool: PoolConfig, name: str = "Generator") -> Application:
    """The Serve application of the generator that `config` asks for, on `pool`."""
    if config.engine is not None:
        server = "generator_worker.local.Generator"
        return engine_application(server, config.engine, pool, name=name, arguments={"config": config})
    from generator_worker.remote import RemoteGenerator

    return serve.deployment(RemoteGenerator).options(name=name, **pool.deployment_options()).bind(config)
