"""What can be wrong in a run, found before any process starts: many small rules; no torch."""
