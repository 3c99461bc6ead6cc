"""A model behind a socket: the OpenAI-compatible API, the page's own API and the built page.

`server.serve` runs it, `app.create_app` builds it. Importing this package loads nothing heavy.
"""

from shenhong.serve.settings import Limits, Settings

__all__ = ["Limits", "Settings"]
