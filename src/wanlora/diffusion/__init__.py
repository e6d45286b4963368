"""Rectified flow: the path from data to noise, drawing noise levels, weighting losses, walking the path back."""
