"""Medusa-1 (Cai et al. 2024): heads on the target's last state, and the drafters that use them."""
