"""A Wan small enough for any machine, clips and captions for it, and one command that runs the real programs on them."""
