"""Optimizer arithmetic on the shards it is handed, and schedules indexed by tokens seen."""
