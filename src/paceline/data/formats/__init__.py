"""Readers of the published annotation formats, each to the same table."""
