"""One file a stage of a run."""
