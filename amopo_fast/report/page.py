"""A self-contained HTML page: no network, no fonts, no libraries; light or dark as the reader's screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from amopo_fast.report.panels import Section
from amopo_fast.report.svg import chart

_STYLE = """
:root{color-scheme:light dark;--bg:#fafaf8;--card:#fff;--text:#1d2127;--dim:#626b78;--line:#e3e5e8;--accent:#4269d0;
--c0:#4269d0;--c1:#e07b00;--c2:#2a9d6f;--c3:#d1495b;--c4:#8a5cc7;--c5:#7d8597;--c6:#b5851f;--c7:#2aa6c0}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1c1f25;--text:#e8eaed;--dim:#9aa3b0;--line:#30353d;
--accent:#8aa7ff;--c0:#7d9bf5;--c1:#ff9d3a;--c2:#4cc38f;--c3:#f0798a;--c4:#b48cf0;--c5:#a3abba;--c6:#d9aa4a;
--c7:#4fc7df}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:34px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
.lead{color:var(--dim);margin:0 0 18px;overflow-wrap:anywhere}
.grid-cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,296px),1fr));gap:14px}
.card{max-width:640px;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;
padding:12px 14px 8px;position:relative;min-width:0;display:flex;flex-direction:column;container-type:inline-size}
figcaption{font-weight:600;font-size:.92rem;overflow-wrap:anywhere}
.note{color:var(--dim);font-size:.78rem;margin:0}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.78rem;color:var(--dim);margin:4px 0 2px;min-height:1.2em}
.key{overflow-wrap:anywhere}
.key::before{content:"";display:inline-block;width:14px;height:0;border-top:3px solid var(--c);border-radius:2px;
margin-right:5px;vertical-align:middle}
.key.dashed::before{border-top-style:dotted}
svg{display:block;width:100%;height:auto;overflow:visible;margin-top:auto}
svg text{font-size:11px;fill:var(--dim);font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.axis{stroke:var(--dim);opacity:.6}
polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
polyline.faint{stroke-width:1;opacity:.28}polyline.dashed{stroke-width:1.4;stroke-dasharray:2 4;opacity:.8}
.band{fill:var(--c);opacity:.13}.whisker{stroke:var(--c);stroke-width:1.6;opacity:.6}
circle{fill:var(--c);stroke:var(--card);stroke-width:1}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 8px;font-size:.78rem;box-shadow:0 2px 10px #0003;white-space:nowrap;z-index:2}
.tip i{display:inline-block;width:8px;height:8px;border-radius:50%;margin-right:6px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
th{color:var(--dim);font-weight:600}
td small{color:var(--dim)}
footer{color:var(--dim);font-size:.8rem;margin-top:40px}
@container (max-width:330px){svg text{font-size:14.5px}}
@media (max-width:520px){main{padding:18px 12px 40px}.card{padding:10px 10px 6px}}
"""

# The nearest point of every line at the pointer's place.
_SCRIPT = """
for (const card of document.querySelectorAll("figure.card")) {
  const svg = card.querySelector("svg"), source = card.querySelector("script");
  if (!svg || !source) continue;
  const series = JSON.parse(source.textContent), tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; card.append(tip);
  const show = event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    tip.replaceChildren(...series.flatMap(([name, color, points]) => {
      if (!points.length) return [];
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = `var(--c${color % 8})`;
      row.append(dot, `${name} ${near[2]}`);
      return [row];
    }));
    tip.hidden = false;
    const card_box = card.getBoundingClientRect(), room = card_box.width - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX - card_box.left + 14, room)) + "px";
    tip.style.top = box.top - card_box.top + 6 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls by itself where it is wider than the screen. Cells are text; "value|detail" shows the
    detail smaller."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    value, _, detail = text.partition("|")
    return escape(value) + (f" <small>{escape(detail)}</small>" if detail else "")


def charts(sections: Sequence[Section]) -> str:
    return "".join(
        f"<h2>{escape(section.title)}</h2>"
        f'<div class="grid-cards">{"".join(chart(panel) for panel in section.panels)}</div>'
        for section in sections
    )


def page(title: str, lead: str, body: str) -> str:
    """The page around HTML that `table` and `charts` made."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}'
        f"<footer>amopo_fast</footer></main><script>{_SCRIPT}</script></body></html>\n"
    )


def write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
