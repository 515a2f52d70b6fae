"""One shard: a range of decoder layers, their KV cache, and the streams that feed them."""
