"""What a run leaves behind while it goes: last actions, events, measured spans, samples of FP8."""
