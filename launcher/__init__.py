"""The command line: argv, Hydra, environment, files, logs and processes. The only package that talks to the world."""
