"""Which devices a gang occupies: `ModelSpec` in, Ray Serve deployment options out. Called by `service.app`.

A Serve replica is a gang: Serve reserves one placement group per replica, all bundles or none, and frees it when the
replica goes. One bundle is one rank; the replica itself needs no device and sits in the first.
"""

from typing import Any

from deploy.spec import ModelSpec


def bundle(model: ModelSpec) -> dict[str, float]:
    """The resources of one rank."""
    cpus = {"CPU": model.placement.cpus_per_rank}
    return cpus if model.device == "cpu" else cpus | {"GPU": 1}


def serve_options(model: ModelSpec) -> dict[str, Any]:
    """Options of the model's Serve deployment: placement, turns, health and patience."""
    return {
        "ray_actor_options": {"num_cpus": 0},
        "placement_group_bundles": [bundle(model)] * model.parallel.world_size,
        "placement_group_strategy": "STRICT_PACK",  # one node: every layer communicates
        "max_ongoing_requests": 1,  # a gang computes one request at a time; the rest waits where it can be rerouted
        "max_queued_requests": model.max_queued,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": model.timeouts.ping_s,
        "graceful_shutdown_timeout_s": model.grace_period_s,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
