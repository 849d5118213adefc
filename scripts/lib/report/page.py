"""One HTML file with everything in it; all text that comes from files is escaped here."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

# nothing is fetched and nothing runs, whatever the run's files say
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #e6e9ed; }
th { font-weight: 600; }
.scroll { overflow-x: auto; }
.scroll table { overflow-wrap: normal; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.panels { display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(max(9.5rem, 100% / 6 - .5rem), 1fr)); }
.panels figcaption { font-size: .75rem; text-align: center; }
div.wide { overflow-x: auto; }
.wide img { min-width: 32rem; max-width: 48rem; }
.bar img { max-width: 24rem; }
figcaption, .note { font-size: .9rem; color: #424a53; margin: .2rem 0 .6rem; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A complete document; `parts` are HTML, `title` is text."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
{body}
</main>
</body>
</html>
"""


def text(value: Any) -> str:
    """Any value as HTML text or attribute."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def section(title: str, *parts: str) -> str:
    """A heading and what follows, or nothing if nothing follows."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def picture(svg: str, alt: str, caption: str, kind: str = "") -> str:
    """An SVG as an image of its own, in which no script runs; `caption` says how to read it.

    kind: "wide" keeps a width that can be read, with a scroll bar of its own; "bar" is a colour scale.
    """
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{text(alt)}">'
    if kind == "wide":
        image = f'<div class="wide" tabindex="0" role="group" aria-label="{text(alt)}">{image}</div>'
    words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind or "plot"}">{image}{words}</figure>'


def grid(figures: Sequence[str], kind: str = "plots") -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="{kind}">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), label: str = "") -> str:
    """Rows whose first cell names them."""
    head = f"<thead><tr>{''.join(f'<th scope=col>{text(cell)}</th>' for cell in header)}</tr></thead>" if header else ""
    body = "\n".join(
        f"<tr><th scope=row>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{text(label)}</caption>" if label else ""
    scroll = f'tabindex="0" role="group" aria-label="{text(label or "table")}"'
    return f'<div class="scroll" {scroll}><table>{title}{head}<tbody>{body}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """Content that is folded away at first."""
    return f"<details>\n<summary>{text(summary)}</summary>\n{content}\n</details>"
