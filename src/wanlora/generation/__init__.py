"""From a prompt to a picture or clip: previews while training, and generation afterwards."""
