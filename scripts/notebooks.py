"""A hook of MkDocs: the examples as notebooks on the site, with a link beside each program of the gallery.

The programs are the source; a notebook is made of each when the site is built. Cells are those of the program, where it
marks some (``# %%``), else its docstring, its functions, and what it does when it is called.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parent.parent / "examples"
# They start processes, read files beside them, or are called with an argument: programs, not notebooks.
PROGRAMS = {"calibrate_c", "export_to_onnx", "glider_c", "many_processes"}


def sources() -> dict[str, Path]:
    """The programs that are shown as notebooks."""
    return {path.stem: path for path in sorted(EXAMPLES.glob("[a-z]*.py")) if path.stem not in PROGRAMS}


def notebook(path: Path) -> str:
    """A program as a notebook, in JSON."""
    text = path.read_text()
    if re.search("^# %%", text, re.M):
        made = jupytext.reads(text, fmt="py:percent")
    else:
        tree = ast.parse(text)
        lines = text.splitlines()
        first, last = tree.body[0], tree.body[-1]
        docstring = ast.get_docstring(tree)
        assert docstring and isinstance(last, ast.If), f"{path}: expected a docstring, and a last block of __main__"
        work = "\n".join(lines[first.end_lineno or 0 : last.lineno - 1]).strip()
        call = f'import sys\n\nsys.argv = ["{path.name}"]  # a notebook has arguments of its own\n'
        made = nbformat.v4.new_notebook()
        made.cells = [
            nbformat.v4.new_markdown_cell(docstring),
            nbformat.v4.new_code_cell(work),
            nbformat.v4.new_code_cell(call + "\n".join(lines[last.lineno - 1 :])),
        ]
    made.cells.insert(0, nbformat.v4.new_code_cell("# !pip install 'jetplane[cli]'"))
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for n, cell in enumerate(made.cells):
        cell["id"] = f"cell-{n}"  # the same at each build
    return nbformat.writes(nbformat.from_dict(made))


def on_files(files: Files, *, config: Any) -> Files:
    """Add the notebooks to the site."""
    for name, path in sources().items():
        files.append(File.generated(config, f"notebooks/{name}.ipynb", content=notebook(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Link them from the gallery."""
    if page.file.src_uri != "gallery.md":
        return markdown
    for name in sources():
        markdown = re.sub(
            rf"(`[^`]*\b{name}\.py[^`]*`)", rf"\1 ([notebook](notebooks/{name}.ipynb))", markdown, count=1
        )
    return markdown
