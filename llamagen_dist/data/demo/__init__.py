"""A captioned set and a text encoder to try everything out with."""
