"""Where models come from: hub, package index, GGUF file, folder. Knows no shard."""
