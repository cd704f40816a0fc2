"""What routes find on a request: whose it is, and what one replica of the Ingress keeps."""

from typing import Annotated

from fastapi import Depends, Request
from ray.serve.handle import DeploymentHandle

from serving.http.admission import InFlight


def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant  # `serving.http.gate` has put it there
    return tenant


Tenant = Annotated[str, Depends(_tenant)]


def router_of(request: Request) -> DeploymentHandle:
    """The Router of the Serve application that this replica belongs to."""
    return request.app.state.router


def questions_of(request: Request) -> InFlight:
    """The questions that this replica is at."""
    questions: InFlight = request.app.state.questions
    return questions
