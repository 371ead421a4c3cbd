"""The state of a run on disk: shards that any layout reads, the published layout, nothing unpickled."""
