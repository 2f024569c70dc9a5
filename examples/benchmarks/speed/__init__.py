"""Time per token, time of a prefill, and memory."""
