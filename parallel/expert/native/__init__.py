"""Expert all-to-all from one kernel source, for GPUs and, to test it, for CPUs. See README.md."""
