"""A self-contained HTML page: no network, no fonts, no libraries; light or dark as the reader's screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from amopo_fast.report.sheet import Panel, Row, card, svg
from amopo_fast.report.style import DIM, GRID, INK, ON_DARK, variable

_LIGHT = ";".join(f"{variable(color)}:{color}" for color in ON_DARK)
_DARK = ";".join(f"{variable(color)}:{dark}" for color, dark in ON_DARK.items())
_COLORS = f"""
:root{{color-scheme:light dark;--bg:#fafaf8;--card:#fff;{_LIGHT};
--ink:var({variable(INK)});--dim:var({variable(DIM)});--grid:var({variable(GRID)})}}
@media (prefers-color-scheme:dark){{:root{{--bg:#14161a;--card:#1c1f25;{_DARK}}}}}
"""
_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1560px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:34px 0 12px;padding-top:14px;border-top:1px solid var(--grid);overflow-wrap:anywhere}
h2 small{color:var(--dim);font-weight:400;margin-left:.6em}
.lead,.foot{color:var(--dim);margin:0 0 18px;overflow-wrap:anywhere}
.foot{margin-top:24px;font-size:.86rem;max-width:75em}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:14px;margin-top:14px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;margin:0;
padding:12px 14px 10px;min-width:0}
figcaption{font-weight:600;font-size:.92rem;overflow-wrap:anywhere}
.note{color:var(--dim);font-size:.78rem;line-height:1.35;margin:4px 0 0}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
th{color:var(--dim);font-weight:600}
td small{color:var(--dim)}
footer{color:var(--dim);font-size:.8rem;margin-top:40px}
@media (max-width:520px){main{padding:18px 12px 40px}.card{padding:10px 10px 6px}}
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


def pictures(rows: Sequence[Row]) -> str:
    """Every panel as a picture of its own, a row under its title, as many beside each other as the screen has room."""
    parts = []
    for number, row in enumerate(rows):
        if row.title:
            detail = f"<small>{escape(row.detail)}</small>" if row.detail else ""
            parts.append(f"<h2>{escape(row.title)}{detail}</h2>")
        cards = [_card(panel, f"p{number}-{index}-", not row.continues) for index, panel in enumerate(row.panels)]
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _card(panel: Panel, prefix: str, with_note: bool) -> str:
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note and with_note else ""
    drawing = svg(card(panel), prefix, panel.title)
    return f'<figure class="card"><figcaption>{escape(panel.title)}</figcaption>{drawing}{note}</figure>'


def page(title: str, lead: str, body: str, foot: str = "") -> str:
    """The page around HTML that `table` and `pictures` made."""
    end = f'<p class="foot">{escape(foot)}</p>' if foot else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_COLORS}{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}{end}'
        "<footer>amopo_fast</footer></main></body></html>\n"
    )


def write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
