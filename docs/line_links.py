"""Links from these pages to lines of code: [`symbol`](../alignment/ppo.py#L189). Line numbers drift; this mends them.

    python docs/line_links.py

A symbol is a function, class, method (`PPOLoop.judge`), field or constant, an option (`--beta`), or any piece of code
that stands in one line of the file only.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LINK = re.compile(r"\[`(?P<symbol>[^`]+)`\]\((?P<path>[^)#\s]+)#L\d+\)")


def definitions(source: str) -> dict[str, list[int]]:
    """The lines where names are defined: methods and fields under `name` and `Class.name`."""
    lines: dict[str, list[int]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            for name in filter(None, names):
                for key in {name, prefix + name}:
                    lines.setdefault(key, []).append(node.lineno)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return lines


def line_of(symbol: str, path: Path) -> int:
    """The line, from 1, of a definition or of a piece of code.

    Raises:
        LookupError: there is none in the file, or several.
    """
    if not path.is_file():
        raise LookupError(f"{path.name} does not exist")
    source = path.read_text(encoding="utf-8")
    found = definitions(source).get(symbol.removeprefix("--"), []) if path.suffix == ".py" else []
    found = found or [number for number, line in enumerate(source.splitlines(), start=1) if symbol in line]
    if len(found) != 1:
        where = f"in several lines ({', '.join(map(str, found))})" if found else "nowhere"
        raise LookupError(f"stands {where} in {path.name}; give one piece of code, or Class.name")
    return found[0]


def mended(page: Path) -> tuple[str, list[str]]:
    """The text of a page with the right line numbers, and a complaint for each link that leads nowhere."""
    complaints: list[str] = []

    def with_line(link: re.Match[str]) -> str:
        try:
            line = line_of(link["symbol"], page.parent / link["path"])
        except LookupError as error:
            complaints.append(f"{page.name}: {link[0]}: {error}")
            return link[0]
        return f"[`{link['symbol']}`]({link['path']}#L{line})"

    return LINK.sub(with_line, page.read_text(encoding="utf-8")), complaints


def main() -> None:
    """Mend all pages of this folder; with links that lead nowhere the exit status is 1."""
    nowhere: list[str] = []
    for page in sorted(FOLDER.glob("*.md")):
        text, complaints = mended(page)
        nowhere += complaints
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"mended {page.name}")
    if nowhere:
        sys.exit("\n".join(nowhere))


if __name__ == "__main__":
    main()
