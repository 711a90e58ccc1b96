"""Serving: an OpenAI-compatible server on an Engine."""
