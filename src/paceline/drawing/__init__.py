"""Pictures and plots of a run, from arrays and records."""
