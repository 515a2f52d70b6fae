"""Teaching a probe which route a prompt needs, offline. Knows no running shard."""
