"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): a head of one layer that drafts from the target's own features."""
