"""Looking for a text in one owner's chats: beside the store, which others need, and for so long and no longer.

SQLite's LIKE takes the text's length times the pattern's where the text is made for it; its instr compares block by
block, which costs a tenth of a second for the largest chat there can be.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any

SECONDS = 1.0
AROUND = 40  # characters of a snippet before and after what was found

CHATS = """SELECT id, title, created, updated, instr(lower(title), lower(:text)) > 0 AS titled
  FROM chat WHERE owner = :owner AND updated < :before ORDER BY updated DESC"""
SNIPPET = f"""SELECT CAST(substr(text, max(1, place - {AROUND}), length(:text) + {2 * AROUND}) AS TEXT) FROM
  (SELECT text, instr(lower(text), lower(:text)) AS place FROM message WHERE chat = :chat) WHERE place > 0 LIMIT 1"""


def search(
    path: Path,
    owner: str,
    text: str,
    limit: int,
    before: float | None,
    clock: Any = time.monotonic,
) -> list[dict[str, Any]]:
    """Newest first, those whose title or messages hold `text`, with a snippet: what is found in time.

    Letters of ASCII are found in either case. Error: sqlite3.Error.
    """
    until = clock() + SECONDS
    found: list[dict[str, Any]] = []
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        db.set_progress_handler(lambda: clock() > until, 1000)
        last = before if before is not None else 1e18
        try:
            for chat in db.execute(CHATS, {"owner": owner, "text": text, "before": last}):
                snippet = db.execute(SNIPPET, {"text": text, "chat": chat["id"]}).fetchone()
                if not (chat["titled"] or snippet):
                    continue
                line = {name: chat[name] for name in ("id", "title", "created", "updated")}
                found.append(line | ({"snippet": snippet[0]} if snippet else {}))
                if len(found) == limit or clock() > until:
                    break
        except sqlite3.OperationalError:
            if clock() <= until:
                raise
    return found
