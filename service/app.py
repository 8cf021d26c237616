"""DeploymentSpec -> Serve applications: one per model, and the gateway. The only place where the parts are joined.

One application per model, because Serve restarts all of an application when part of it changes.
"""

from ray import serve
from ray.serve import Application, Deployment, RunTarget

from deploy.spec import DeploymentSpec, ModelSpec
from service.gateway import GANG, Gateway, app_name
from workers.gang import Gang
from workers.placement import serve_options

GATEWAY_APP = "gateway"


def build_model(model: ModelSpec) -> Application:
    """The application whose replicas are the gangs of one model."""
    deployment: Deployment = serve.deployment(name=GANG, **serve_options(model))(Gang)
    return deployment.bind(model)


def build_gateway(spec: DeploymentSpec, instance_id: str) -> Application:
    """The application behind the doors."""
    table = {"models": [model.model_dump(mode="json") for model in spec.models]}
    configure = serve.deployment(
        name="Gateway", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, user_config=table
    )
    deployment: Deployment = configure(serve.ingress()(Gateway))
    return deployment.bind(instance_id)


def build(spec: DeploymentSpec, instance_id: str) -> list[RunTarget]:
    """All applications of a deployment, for `serve.run_many`."""
    models = [RunTarget(build_model(model), name=app_name(model.name), route_prefix=None) for model in spec.models]
    return [*models, RunTarget(build_gateway(spec, instance_id), name=GATEWAY_APP, route_prefix="/")]
