"""The `stitch` command: `main` parses its arguments, and one module per verb runs it."""
