"""Names for `--network_module`."""
