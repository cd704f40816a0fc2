"""What a tenant may have: settings, and their check. The `Catalog` holds every tenant to them."""

from pydantic import Field

from cluster.config import Settings
from memory_worker.errors import QuotaExceeded


class Quota(Settings):
    """What one tenant may have; none is unlimited."""

    memories: int | None = Field(None, ge=0, description="memories at most")
    tokens: int | None = Field(None, ge=0, description="tokens of all memories' texts together")
    bytes: int | None = Field(None, ge=0, description="bytes of all memories' slots together")
    jobs: int | None = Field(None, ge=1, description="jobs waiting or running at a time")
    requests_per_minute: int | None = Field(None, ge=1, description="HTTP requests a minute")


class QuotasConfig(Settings):
    """Quotas of tenants."""

    default: Quota = Field(Quota(), description="of tenants that are not named")
    tenants: dict[str, Quota] = Field(default_factory=dict, description="of these tenants, by id")

    def of(self, tenant: str) -> Quota:
        """The quota of `tenant`."""
        return self.tenants.get(tenant, self.default)


def require(what: str, limit: int | None, wanted: int) -> None:
    """Raises `QuotaExceeded` if `wanted` is more than `limit`."""
    if limit is not None and wanted > limit:
        raise QuotaExceeded(what, limit, wanted)
