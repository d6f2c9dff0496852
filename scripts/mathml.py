"""A hook of MkDocs: TeX in pages as MathML, which browsers draw themselves, without a script.

Formulas are written as GitHub draws them too: a fenced block (```` ```math ````), or ``$`...`$`` within a line.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


def mathml(source: str, display: str) -> str:
    """A formula; ValueError where the converter left TeX in it as text."""
    made = convert(source, display=display)
    if "\\" in made or "<mi>&</mi>" in made:
        raise ValueError(f"expected TeX that latex2mathml knows, got:\n{source}\nIt made: {made}")
    # Browsers align columns by CSS alone (MathML Core).
    return re.sub(r'columnalign="(left|right)"', r'style="text-align: \1; padding: 0.2em 0.1em"', made)


def block(source: str, *_: Any, **__: Any) -> str:
    """A formula of its own, as a custom fence of pymdownx.superfences."""
    return f'<div style="overflow-x: auto; padding: 0.3em 0">{mathml(source, "block")}</div>'


class Inline(InlineProcessor):
    """A formula within a line."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802 (the library's name)
        """The formula, and where it stands."""
        assert self.md is not None
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class Formulas(Extension):
    """``$`...`$``, before backquotes are read as code (priority 190)."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (the library's name)
        """Register it."""
        md.inlinePatterns.register(Inline(r"\$`([^`]+)`\$", md), "formula", 200)


def on_config(config: Any) -> Any:
    """Add both to the extensions of mkdocs.yml."""
    config.markdown_extensions.append(Formulas())
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": block})
    return config
