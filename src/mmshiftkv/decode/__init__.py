"""Ways to decode with a cache in storage of a fixed size: a loop for `generate`, and a backend of torch.compile."""
