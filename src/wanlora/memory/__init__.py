"""Fitting a run into the card: streaming blocks, recomputing them, compiling them, measuring what they take."""
