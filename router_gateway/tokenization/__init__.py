"""Text to token ids and back: the vocabulary that a shard sends, chat templates, streaming decode, stop strings."""
