"""Replicas of the server behind one address: `pip install 'ray[serve]'`, then `serve run examples.ray_serve:app`."""

from fastapi import FastAPI
from ray import serve

import kangaroo
from kangaroo.serve.app import make_app
from kangaroo.serve.service import Service


def build() -> FastAPI:
    """In every replica: an application whose model loads when it starts."""
    return make_app(Service(lambda: kangaroo.load("demo").engine(), "demo"))


@serve.deployment(num_replicas=2)
@serve.ingress(build)
class Replica:
    """Everything is in the application."""


app = Replica.bind()  # type: ignore[attr-defined]
