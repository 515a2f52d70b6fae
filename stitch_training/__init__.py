"""Offline training: stitches, probes and routers, from text and labels to the artifacts that serving reads."""
