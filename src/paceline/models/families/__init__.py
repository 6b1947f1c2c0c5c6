"""One file per published family of networks."""
