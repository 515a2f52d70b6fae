"""A router learned from labelled texts. At run time it needs numpy alone; `stitch_training` fits it."""
