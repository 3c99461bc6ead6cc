"""One room a kind of text: what is read, how it is asked for, measured, reported and shown."""
