"""Frozen weights in eight bits: made while a checkpoint is read, used by a linear layer that keeps nothing wide."""
