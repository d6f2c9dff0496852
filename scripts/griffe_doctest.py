"""For the reference pages: examples in docstrings (``>>>``) are shown as code.

An extension of griffe, which mkdocstrings reads docstrings with. Without it Markdown takes ``>>>`` for a quotation.
"""

import re

import griffe

_EXAMPLE = re.compile(r"(?:^ *>>>.*\n?(?:^(?! *$).*\n?)*)", re.M)  # up to the next empty line


class Doctest(griffe.Extension):
    """Fences examples in all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its examples in fences."""
    return _EXAMPLE.sub(lambda m: f"```pycon\n{m.group().rstrip()}\n```\n", text)
