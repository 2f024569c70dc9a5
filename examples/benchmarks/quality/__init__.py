"""How many answers stay right when the cache is compressed."""
