"""The YAML files that Hydra composes; a package so that an installed copy carries them."""
