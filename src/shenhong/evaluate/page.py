"""A report as a list of blocks, each of which can set itself as HTML and as Markdown.

Whatever a block is given is text, never markup: model output, titles and settings are not trusted. The page
is one file without scripts, and its content policy forbids it to load anything from anywhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Block(Protocol):
    def html(self) -> str: ...

    def markdown(self) -> str: ...


def escape(text: object) -> str:
    """Text as HTML, safe in elements and in quoted attributes."""
    return html.escape(_printable(str(text)), quote=True)


def escape_markdown(text: object) -> str:
    """Text as one line of Markdown that renders as itself: no markup, HTML, images or links."""
    line = re.sub(r"\s+", " ", _printable(str(text)))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#|~!$^=])", r"\\\1", line)
    # Plain addresses would become links.
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def share(estimate: Mapping[str, Any] | None, error: bool = True) -> str:
    """{"value", "error"} as a percentage."""
    if not estimate or not isinstance(estimate.get("value"), int | float):
        return "–"
    text = f"{100 * estimate['value']:.1f} %"
    if error and isinstance(estimate.get("error"), int | float):
        text += f" ± {100 * estimate['error']:.1f}"
    return text


def _printable(text: str) -> str:
    """Control characters, surrogates and marks that change the direction of text made visible."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text
    )  # fmt: skip


@dataclass(frozen=True)
class Heading:
    text: str

    def html(self) -> str:
        return f"<h2>{escape(self.text)}</h2>"

    def markdown(self) -> str:
        return f"## {escape_markdown(self.text)}"


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p class=note>{escape(self.text)}</p>"

    def markdown(self) -> str:
        return escape_markdown(self.text)


@dataclass(frozen=True)
class Tiles:
    """The few numbers to see first: (name, number, what it stands beside)."""

    items: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        tiles = "".join(
            f"<div class=tile><div class=name>{escape(name)}</div><div class=number>{escape(number)}</div>"
            f"<div class=beside>{escape(beside)}</div></div>"
            for name, number, beside in self.items
        )
        return f"<div class=tiles>{tiles}</div>"

    def markdown(self) -> str:
        return "\n".join(
            f"- {escape_markdown(name)}: **{escape_markdown(number)}** {escape_markdown(beside)}".rstrip()
            for name, number, beside in self.items
        )


@dataclass(frozen=True)
class Table:
    """Cells are text; all columns but the first `words` are numbers and set to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    caption: str = ""

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            out = ""
            for i, cell in enumerate(cells):
                kind = "" if i < self.words else " class=n"
                scope = " scope=col" if tag == "th" else ""
                out += f"<{tag}{scope}{kind}>{escape(cell)}</{tag}>"
            return f"<tr>{out}</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<div class=wide><table>{caption}<thead>{row(self.header, 'th')}</thead>"
            f"<tbody>{body}</tbody></table></div>"
        )

    def markdown(self) -> str:
        rule = ["---" if i < self.words else "---:" for i in range(len(self.header))]
        rows = [list(map(escape_markdown, cells)) for cells in (self.header, *self.rows)]
        rows.insert(1, rule)
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
        return f"{escape_markdown(self.caption)}\n\n{table}" if self.caption else table


@dataclass(frozen=True)
class Verbatim:
    """A file's text as it is, folded under its title."""

    title: str
    text: str

    def html(self) -> str:
        return (
            f"<details><summary>{escape(self.title)}</summary>"
            f"<pre>{escape(self.text)}</pre></details>"
        )

    def markdown(self) -> str:
        longest = max((len(run) for run in re.findall(r"`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return (
            f"{escape_markdown(self.title)}\n\n{fence}\n{_printable(self.text).rstrip()}\n{fence}"
        )


@dataclass(frozen=True)
class Grid:
    """Blocks side by side where there is room."""

    blocks: Sequence[Block]

    def html(self) -> str:
        return f"<div class=grid>{''.join(block.html() for block in self.blocks)}</div>"

    def markdown(self) -> str:
        return "\n\n".join(block.markdown() for block in self.blocks)


def page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The whole HTML page."""
    body = "\n".join(block.html() for block in blocks)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        "<meta name=color-scheme content=\"light dark\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f"<header><div class=seal aria-hidden=true>深红</div><div><h1>{escape(title)}</h1>"
        f"<p>{escape(subtitle)}</p></div></header>\n{body}\n</main></body></html>\n"
    )  # fmt: skip


def markdown_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The same as Markdown."""
    parts = [f"# {escape_markdown(title)}", escape_markdown(subtitle)]
    return "\n\n".join([*parts, *(block.markdown() for block in blocks)]) + "\n"


_STYLE = """
:root{--paper:#fbf9f5;--card:#fff;--ink:#1f1b18;--soft:#6b625a;--line:#e4ddd2;--accent:#a01c22;
--c0:#a01c22;--c1:#2a6a9e;--c2:#b7791f;--c3:#3b7d4f;--c4:#7a4fa3;--c5:#4d5b66;--heat:160,28,34}
@media(prefers-color-scheme:dark){:root{--paper:#171412;--card:#201c1a;--ink:#ece5dc;--soft:#a2968a;
--line:#3a332e;--accent:#f0706c;--c0:#f0706c;--c1:#6db3e8;--c2:#e0b04f;--c3:#78c290;--c4:#c09ae6;
--c5:#a9b6c0;--heat:240,112,108}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","PingFang SC","Noto Sans CJK SC",sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}
header{display:flex;gap:1rem;align-items:center;margin-bottom:1.5rem}
header p{margin:.1rem 0 0;color:var(--soft);font-size:.9rem}
h1{font-size:1.6rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
.seal{flex:none;writing-mode:vertical-rl;background:var(--accent);color:var(--paper);border-radius:.35rem;
padding:.45rem .3rem;font:700 1.15rem/1.1 "Noto Serif CJK SC","Songti SC",STSong,SimSun,serif;letter-spacing:.1em}
.note{color:var(--soft);font-size:.88rem;max-width:48rem;margin:.5rem 0 1rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem .9rem;min-width:0}
.tile .name,.tile .beside{font-size:.8rem;color:var(--soft)}
.tile .number{font-size:1.5rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.88rem;min-width:min(100%,24rem)}
caption{text-align:left;color:var(--soft);padding-bottom:.4rem}
th,td{padding:.35rem .9rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td:not(.n){overflow-wrap:break-word;min-width:5.5rem;max-width:28rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:.9rem;align-items:start}
figure{margin:0}
figcaption{font-size:.88rem;font-weight:600;margin-bottom:.35rem}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .axis{stroke:var(--line)}svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.78rem;color:var(--soft);margin-top:.3rem}
.key i{display:inline-block;width:.8rem;height:.2rem;border-radius:1px;vertical-align:middle;margin-right:.35rem}
.shares{display:flex;height:1.1rem;border-radius:.3rem;overflow:hidden;margin:.4rem 0 .6rem}
.shares span{min-width:1px}
.shares+.key i{height:.7rem;border-radius:.15rem}
.heat{overflow-x:auto;display:grid;gap:2px;font-size:.72rem;color:var(--soft);align-items:center}
.heat b{font-weight:400;padding-right:.4rem;white-space:nowrap}.heat i{min-width:2px;height:1.15rem;border-radius:2px}
@media(max-width:40rem){table{font-size:.8rem}th,td{padding-right:.55rem}td:not(.n){min-width:4.2rem}
h2{margin-top:2rem}}
details{margin:.7rem 0}summary{cursor:pointer;color:var(--soft);font-size:.88rem}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem;font-size:.8rem}
.poem h3{margin:0;font-size:1rem;font-weight:600;overflow-wrap:anywhere}
.poem .facts{font-size:.78rem;color:var(--soft);margin:.1rem 0 .5rem}
.poem .lines{font:1.4rem/1.2 "Noto Serif CJK SC","Songti SC",STSong,SimSun,serif;margin:.4rem 0}
.poem .lines div{margin:.42rem 0;overflow-wrap:anywhere}
ruby{ruby-position:under;margin-right:.06em}
rt{font:.56em/1.35 "Noto Sans CJK SC","PingFang SC",sans-serif;color:var(--soft);opacity:.85}
.ze rt{opacity:1;font-weight:700}
.miss rt{color:var(--paper);background:var(--c2);border-radius:.2em;opacity:1}
.rhyme{color:var(--accent);font-weight:700}
.tag{display:inline-block;border:1px solid var(--line);border-radius:1rem;padding:0 .55rem;margin:.15rem .25rem 0 0;font-size:.75rem;color:var(--soft)}
.tag.good{border-color:var(--c3);color:var(--c3)}.tag.bad{border-color:var(--c2);color:var(--c2)}
"""
