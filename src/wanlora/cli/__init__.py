"""Entry points: parse, build, run; nothing else."""
