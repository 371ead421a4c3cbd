"""Tests of nodes and links with the layout of a run, before the run: `expertpipe preflight`."""
