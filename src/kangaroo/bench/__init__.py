"""Measuring: is it lossless, how fast is it, and how fast could it be."""
