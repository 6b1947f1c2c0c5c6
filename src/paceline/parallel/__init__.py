"""How a step is carried out on one or many devices."""
