"""Packs: a whole data set, images and labels, in one checksummed file, here or behind an address."""
