"""`expertpipe plan`: words in, tables and pictures out; the planner itself is `parallel/plan`."""
