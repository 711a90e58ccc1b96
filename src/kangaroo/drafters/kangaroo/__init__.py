"""Kangaroo (Liu et al. 2024): the target's first layers and an adapter draft."""
