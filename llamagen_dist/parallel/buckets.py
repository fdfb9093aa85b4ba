"""Sizes that DeepSpeed works with at a time; the engine sets them and the memory plan counts them. No torch here."""

# 400 MB of fp32: large enough that a collective is limited by bandwidth and not by its latency, and small beside the
# state of the models that need sharding at all. DeepSpeed's default is five times as much.
LARGEST_BUCKET = 100_000_000
"""Elements that DeepSpeed reduces or gathers at a time at most."""
LARGEST_SUM = 500_000_000
"""Elements of fp32 gradient sums that DeepSpeed's bf16 ZeRO-1 flattens at a time (a constant of its own)."""
