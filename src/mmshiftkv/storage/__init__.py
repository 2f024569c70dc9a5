"""Keys and values at rest: storage that grows, storage of a fixed size, and buffers that outlive a cache."""
