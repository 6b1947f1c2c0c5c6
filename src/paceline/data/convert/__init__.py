"""Convert: writers of the formats that data sets come in."""
