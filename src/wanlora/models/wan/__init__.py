"""Wan 2.1: the released variants, their networks and how their files are read."""
