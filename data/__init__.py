"""Token files, sampling as a pure function of the sample index, and corpus preparation."""
