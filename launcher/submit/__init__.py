"""From a checked and planned run to a job of Slurm: `expertpipe submit`."""
