"""Making stitches: reading text, least squares, distillation, judging. Knows no shard and no wire."""
