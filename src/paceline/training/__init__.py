"""The loop and what it calls: optimiser, schedule, moving average, checkpoints."""
