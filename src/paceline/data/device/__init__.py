"""Pictures made on the device: sources are packed on the host, one kernel draws the batch."""
