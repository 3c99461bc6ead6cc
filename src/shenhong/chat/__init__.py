"""A conversation as a model reads and writes it: templates, tool calls, thinking. Nothing of HTTP."""
