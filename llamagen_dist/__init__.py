"""llamagen-dist: images become tokens, tokens train a Llama, the Llama paints images, on one core or a cluster."""

__version__ = "0.1.0"
