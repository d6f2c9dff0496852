"""Tables of instructions on vector registers: one rule for each, on lanes of 64 bits.

The decoder's P-code is not used for them: it rounds FMA twice and forgets upper halves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .decode import Immediate, Instruction, Memory, Operand, Vector
from .translator import Lane, Refused, Translator

Rule = Callable[[Translator, str, tuple[Operand, ...]], None]

RELATIONS = {
    "EQ": "oeq", "LT": "olt", "LE": "ole", "UNORD": "uno", "NEQ": "une", "NLT": "uge", "NLE": "ugt", "ORD": "ord",
    "EQ_UQ": "ueq", "NGE": "ult", "NGT": "ule", "NEQ_OQ": "one", "GE": "oge", "GT": "ogt", "EQ_OQ": "oeq",
    "LT_OS": "olt", "LE_OS": "ole", "NEQ_UQ": "une", "NLT_US": "uge", "NLE_US": "ugt", "ORD_Q": "ord", "UNORD_Q": "uno",
    "NGE_US": "ult", "NGT_US": "ule", "GE_OS": "oge", "GT_OS": "ogt", "LT_OQ": "olt", "LE_OQ": "ole", "NLT_UQ": "uge",
    "NLE_UQ": "ugt", "NGE_UQ": "ult", "NGT_UQ": "ule", "GE_OQ": "oge", "GT_OQ": "ogt",
}  # fmt: skip


class Table(dict[str, Rule]):
    """Rules by the name of an instruction, without V."""

    def declare(self, names: str) -> Callable[[Rule], Rule]:
        """Enter a rule for instructions of these names."""

        def entered(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names.split(), rule))
            return rule

        return entered


def translate(t: Translator, i: Instruction, rules: Mapping[str, Rule]) -> bool:
    """One instruction, if it is one on vector registers."""
    name = i.name
    operands = i.operands
    if name in ("VZEROUPPER", "VZEROALL"):
        for n in range(16):
            for lane in range(0 if name == "VZEROALL" else 2, 4):
                t.put(f"x{n}.{lane}", Lane("0"))
        return True
    if re.search(r"ZMM|[XY]MM(1[6-9]|[23][0-9])|\bK[0-7]\b", i.body):
        raise Refused(
            f"uses AVX-512, which is not carried ({i}); build it for AVX2: -march=x86-64-v3, NUMBA_CPU_NAME=x86-64-v3"
        )
    short = name[1:] if name.startswith("V") else name
    # A double that is read from memory and becomes an integer meets no vector register.
    if operands is None or not (short in ("CVTTSD2SI", "CVTSD2SI") or any(isinstance(o, Vector) for o in operands)):
        return False
    rule = rules.get(short)
    if rule is None:
        short, operands = comparison(short, operands)
        rule = rules.get(short)
    if rule is None:
        raise Refused(f"no rule for the instruction {i}")
    try:
        rule(t, short, operands)
    except (AttributeError, IndexError, ValueError, AssertionError) as error:  # operands of a form that is not carried
        raise Refused(f"no rule for the operands of {i}") from error
    return True


def comparison(name: str, ops: tuple[Operand, ...]) -> tuple[str, tuple[Operand, ...]]:
    """A comparison's name without its relation, which the decoder puts into it."""
    found = re.fullmatch(r"CMP(\w+?)(PD|SD)", name)
    return (f"CMP.{found[2]}", ops) if found and found[1] in RELATIONS else (name, ops)


def three(t: Translator, ops: tuple[Operand, ...]) -> tuple[Vector, Operand, Operand]:
    """Destination and two sources: SSE names the first source as the destination."""
    if t.instruction.name.startswith("V"):
        to, x, y = ops[:3]
    else:
        (to, y), x = ops[:2], ops[0]
    assert isinstance(to, Vector)
    return to, x, y


def count(to: Operand) -> int:
    """The number of lanes."""
    assert isinstance(to, Vector | Memory)
    return to.size // 8


def immediate(o: Operand) -> int:
    """A constant of 8 bits."""
    assert isinstance(o, Immediate)
    return o.value & 255
