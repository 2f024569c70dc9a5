"""A tiny Qwen2.5-VL that reads synthetic document pages: its pages, its files and its training."""
