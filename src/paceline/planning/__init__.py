"""Planning: what a device can do, what a step asks of it, and therefore how long it has to take."""
