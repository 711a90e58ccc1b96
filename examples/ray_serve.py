"""Replicas of the server behind one address, by Ray Serve: `pip install 'ray[serve]'`, `serve run examples.ray_serve:app`."""

import kangaroo
from fastapi import FastAPI
from ray import serve

from kangaroo.serve.app import make_app
from kangaroo.serve.service import Service


def build() -> FastAPI:
    """In every replica: an application whose model loads when it starts."""
    return make_app(Service(lambda: kangaroo.load("demo").engine(), "demo"))


@serve.deployment(num_replicas=2)
@serve.ingress(build)
class Replica:
    """Everything is in the application."""


app = Replica.bind()
