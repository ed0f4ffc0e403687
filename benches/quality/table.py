"""`docs/quality.md` from results."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
BETWEEN = re.compile(r"(?<=<!-- measured: begin -->\n).*?(?=<!-- measured: end -->)", re.DOTALL)
SHARED = (("bits", "bits a weight", ".2f"), ("cpu", "CPU s", ".0f"))


def write_page(results):
    """Replace the tables of the page."""
    text = "\n".join(f"### {entry['title']}\n\n{_table(entry)}\n" for entry in results.values())
    PAGE.write_text(BETWEEN.sub(lambda _: f"\n{text}\n", PAGE.read_text()))


def _table(entry):
    """Markdown; of each column the best number in Q40 is bold."""
    columns, rows = entry["columns"], entry["rows"]
    packed = [row for method, row in rows.items() if method != "float"]
    best = {c["key"]: (min if c["least"] else max)(row[c["key"]] for row in packed) for c in columns if c["form"]}
    heads = ["`method`", *(c["heading"] for c in columns), *(head for _, head, _ in SHARED), "in tract"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, row in rows.items():
        cells = [method if method == "float" else f"`{method}`"]
        for c in columns:
            cell = format(row[c["key"]], c["form"])
            cells.append(f"**{cell}**" if method != "float" and row[c["key"]] == best.get(c["key"]) else cell)
        cells += [format(row[key], form) for key, _, form in SHARED]
        lines.append("| " + " | ".join([*cells, "verified" if row.get("verified") else ""]) + " |")
    return "\n".join(lines)
