"""What a run will cost, hold and take before any process of it starts."""
