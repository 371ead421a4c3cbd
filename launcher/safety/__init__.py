"""What keeps a run alive or ends it well: locks, watchdog, spikes, signals, agreement of all ranks."""
