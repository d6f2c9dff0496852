"""Text of LLVM functions, block after block."""

from __future__ import annotations


class Assembly:
    """The body of one function.

    Values are their names: ``%v1`` for what an instruction computes, digits for constants.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.block = ""
        self.closed = True
        self._count = 0

    def _new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def op(self, text: str) -> str:
        """An instruction with a result, whose name is returned."""
        name = self._new("%v")
        self.lines.append(f"  {name} = {text}")
        return name

    def do(self, text: str) -> None:
        """An instruction without a result."""
        self.lines.append(f"  {text}")

    def label(self, name: str = "b") -> str:
        """A name for a block that is to come."""
        return self._new(name + ".")

    def begin(self, label: str) -> None:
        """Begin a block."""
        assert self.closed, f"{self.block} goes on"
        self.lines.append(f"{label}:")
        self.block, self.closed = label, False

    def end(self, text: str) -> None:
        """The instruction that ends a block."""
        self.lines.append(f"  {text}")
        self.closed = True

    def go(self, label: str) -> None:
        """End a block by going to another one."""
        self.end(f"br label %{label}")

    def fork(self, condition: str, yes: str, no: str, *, rare: bool = False) -> None:
        """End a block by going to one of two; ``rare``: to the first one seldom."""
        self.end(f"br i1 {condition}, label %{yes}, label %{no}" + (", !prof !0" if rare else ""))
