"""A Wan small enough for any machine, clips for it, and one command that runs the real programs on them."""
