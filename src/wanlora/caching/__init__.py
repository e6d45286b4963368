"""Walks datasets, encodes what is missing or has changed, and never loses what is there."""
