"""Scenes: generated pictures of shapes, the raw material of the embedded data set."""
