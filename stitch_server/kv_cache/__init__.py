"""The KV cache of a shard's layers: which blocks a sequence has, and the tensors of the blocks."""
