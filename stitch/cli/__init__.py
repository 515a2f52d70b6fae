"""The verbs of the `stitch` command, one module each. Knows no command line: `stitch.cli.main` has parsed it."""
