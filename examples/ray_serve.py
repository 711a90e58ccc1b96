"""Replicas of the server behind one address: `pip install 'ray[serve]'`, then `serve run examples.ray_serve:app`."""

from fastapi import FastAPI
from ray import serve

import kangaroo
from kangaroo.machine import bound_kernel_caches
from kangaroo.serve.app import make_app
from kangaroo.serve.service import Service


def build() -> FastAPI:
    """In every replica, which takes no requests before it has loaded the model."""
    bound_kernel_caches()
    engine = kangaroo.load("demo").engine(rows=16)
    return make_app(Service(lambda: engine, "demo"), drain=30)


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=32,  # those that have a row, and as many that wait for one
    graceful_shutdown_timeout_s=40,  # longer than `drain`
    ray_actor_options={"num_cpus": 1, "memory": 2 << 30},
)
@serve.ingress(build)
class Replica:
    """Everything is in the application."""


app = Replica.bind()  # type: ignore[attr-defined]
