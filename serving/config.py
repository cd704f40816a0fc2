"""One YAML file, one frozen `Profile`: every value that a user may set, composed from the rooms' settings."""

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.config import Settings
from cluster.errors import MessageError
from cluster.pools.pools import PoolConfig
from generator_worker.config import GeneratorConfig
from memory_worker.catalog.quotas import QuotasConfig
from memory_worker.config import MemoryConfig
from retrieval_worker.config import RetrievalConfig

_SHIPPED = Path(__file__).parent / "profiles"
APPLICATION = "memorag"  # the name of what runs on Ray Serve
EMBEDDED = "embedded"  # the model name that stands for the language model that comes with the project


class ProfileError(MessageError, ValueError):
    """A profile that cannot be used; the message says which key, why, and what would be valid."""


class PoolsConfig(Settings):
    """The pools, by name: what one replica of the deployments on each takes."""

    memory: PoolConfig = Field(PoolConfig(), description="Memorizer and Recaller")
    retrieval: PoolConfig = Field(PoolConfig(), description="Embedder and Retriever")
    generator: PoolConfig = Field(PoolConfig(), description="Generator")
    cpu: PoolConfig = Field(PoolConfig(), description="Ingress and Router")


class TracingConfig(Settings):
    """OpenTelemetry traces: a span for each stage of a question, and for each call between processes."""

    enabled: bool = Field(False, description="whether traces are made")
    exporter: str = Field(
        "",
        description="package.module:function that returns OpenTelemetry span processors; none writes files beside "
        "Serve's logs",
    )
    sampling_ratio: float = Field(0.01, ge=0, le=1, description="share of requests that are traced")


class RayConfig(Settings):
    """The Ray cluster."""

    address: str = Field("local", description="local starts one on this machine; auto joins the one that runs here")
    namespace: str = Field("memorag", description="Ray namespace of the keepers and the catalog")
    logical_cpus: int | None = Field(None, ge=1, description="CPUs a local cluster counts; none takes the machine's")
    metrics: bool = Field(True, description="whether a local cluster collects Ray's metrics; they cost every request")
    autoscaling: bool = Field(
        False, description="whether the cluster adds nodes by itself: a pool that has none is then waited for"
    )
    tracing: TracingConfig = TracingConfig()
    logs: Literal["text", "json"] = Field("text", description="how replicas write their logs")
    object_store_bytes: int | None = Field(
        None, ge=80 * 2**20, description="object store of a local cluster; none takes Ray's default"
    )


class ConvertConfig(Settings):
    """What the conversion of one HTML, PDF or Word file may take; beyond it, the file is refused."""

    seconds: float = Field(
        60.0,
        gt=0,
        description="CPU seconds that converting one file may take; one that does nothing for so long is ended, too",
    )
    memory_bytes: int = Field(2 * 2**30, ge=2**29, description="bytes of address space that one converter may take")
    characters: int = Field(20_000_000, gt=0, description="characters of text that one converted file may give")


class LimitsConfig(Settings):
    """What a request may ask for; beyond it, it is refused with 413 or 422."""

    body_bytes: int = Field(64 * 2**20, gt=0, description="bytes of one JSON request body")
    upload_bytes: int = Field(4 * 2**30, gt=0, description="bytes of one request that uploads files")
    documents: int = Field(1024, gt=0, description="documents in one memory")
    questions_in_flight: int = Field(256, gt=0, description="questions one Ingress works on at a time; beyond, 429")
    conversions: int = Field(2, gt=0, description="HTML, PDF and Word files one Ingress converts at a time")
    convert: ConvertConfig = ConvertConfig()
    question_s: float = Field(300.0, gt=0, description="seconds one question may take in all")
    question_characters: int = Field(100_000, gt=0, description="characters of one question")
    history_characters: int = Field(
        8_000, ge=0, description="characters of the conversation before a question that are read; the oldest turns go"
    )
    answer_tokens: int = Field(4096, gt=0, description="max_tokens that one answer may ask for")


class RouterConfig(Settings):
    """What each Router keeps."""

    cached_manifests_mib: int = Field(
        256, ge=0, description="MiB of RAM for the manifests of memories asked lately; one of 1,000 documents takes 6"
    )


class AuthConfig(Settings):
    """Who may call."""

    mode: Literal["keys", "off"] = Field(
        "keys", description="keys: every request needs an API key, which says whose it is; off: on loopback only"
    )


class Profile(Settings):
    """A whole deployment."""

    ray: RayConfig = RayConfig()
    pools: PoolsConfig = PoolsConfig()
    memory: MemoryConfig
    retrieval: RetrievalConfig = RetrievalConfig()
    generator: GeneratorConfig
    router: RouterConfig = RouterConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    quotas: QuotasConfig = QuotasConfig()

    @model_validator(mode="after")
    def _grace_outlasts_questions(self) -> "Profile":
        if self.memory.catalog.grace_s < self.limits.question_s:
            raise ValueError(
                f"memory.catalog.grace_s ({self.memory.catalog.grace_s:g}) must not be less than limits.question_s "
                f"({self.limits.question_s:g}), or a version could be deleted under a question"
            )
        return self


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, or from that YAML file.

    Raises `ProfileError`, naming the nearest valid key or name for a misspelt one.
    """
    if name_or_path in profile_names():
        text = (_SHIPPED / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        raise ProfileError(
            f"no profile {name_or_path!r}{_nearest(name_or_path, profile_names())}: "
            f"give one of {', '.join(profile_names())}, or the path of a YAML file"
        )
    return parse_profile(text, name_or_path)


def parse_profile(text: str, source: str) -> Profile:
    """The profile in the YAML `text`; `source` names it in errors."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ProfileError(f"{source} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{source} is not a mapping of settings")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise ProfileError(f"{source}: " + "; ".join(lines)) from None


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in location)
    if not key:
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        valid = _fields_at(Profile, location[:-1])
        return f"unknown key {key!r}{_nearest(str(location[-1]), valid)} (valid: {', '.join(valid)})"
    return f"{key}: {message}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    parts = iter(location)
    for part in parts:
        annotation = model.model_fields[str(part)].annotation
        found = _model_in(annotation)
        if found is None:
            return []
        if typing.get_origin(annotation) is dict:
            next(parts, None)  # a name that the user chose
        model = found
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    holders = (types.UnionType, typing.Union, dict)
    options = typing.get_args(annotation) if typing.get_origin(annotation) in holders else ()
    for option in options or (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
