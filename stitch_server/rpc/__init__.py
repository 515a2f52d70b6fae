"""How requests arrive at a shard and leave it: messages to domain calls and back. Computes nothing."""
