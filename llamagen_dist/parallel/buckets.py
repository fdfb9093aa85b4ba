"""Sizes that DeepSpeed works with at a time; the engine sets them and the memory plan counts them. No torch here."""

LARGEST_BUCKET = 100_000_000
"""Elements that DeepSpeed reduces or gathers at a time at most."""
LARGEST_SUM = 500_000_000
"""Elements of fp32 gradient sums that DeepSpeed's bf16 ZeRO-1 flattens at a time (a constant of its own)."""
