"""Numbers of few bits: one file a format."""
