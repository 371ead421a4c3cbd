"""Parallelism applied from outside the model: mesh, pipeline schedules, expert all-to-all, ZeRO-1."""
