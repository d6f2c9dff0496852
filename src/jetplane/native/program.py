"""What is known of a function of machine code and of all that it calls, whatever coefficients they carry."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import NativeCodeError
from . import decode, library, mathematics, system
from .process import Maps, described, read
from .registers import DOUBLES, INTEGERS, MASK, PRESERVED, RETURNED, touched


@dataclass
class Profile:
    """Registers that a function takes, returns, and leaves changed."""

    arguments: tuple[str, ...]
    returns: tuple[str, ...]
    clobbers: tuple[str, ...]


@dataclass
class Program:
    """What is known of the code, whatever coefficients it carries.

    Attributes:
        entry: where it begins.
        constants: names of functions that are called as they are.
        custom: rules of the user's by name.
    """

    entry: int
    constants: tuple[str, ...] = ()
    custom: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoder = decode.Decoder()
        self.rules = library.table(self.decoder.maps)
        self.functions: dict[int, decode.Function] = {}
        self.profiles: dict[int, Profile] = {}
        self.known: dict[int, list[int]] = {}
        self.opened = {self.entry}
        self.used: set[str] = set()
        self.followed: set[tuple[int, int]] = set()
        self._own: dict[int, library.Rule | None] = {}

    # --- what an address is -------------------------------------------------------------------------------

    def resolved(self, address: int) -> int:
        """Where a stub of a procedure linkage table leads."""
        for _ in range(4):
            if address in self.rules:
                return address
            region = self.decoder.maps.at(address)
            if region is None or "x" not in region.rights:
                return address
            code = read(address, min(16, region.end - address))
            skip = 4 if code[:4] == b"\xf3\x0f\x1e\xfa" else 0
            skip += code[skip : skip + 1] == b"\xf2"
            if code[skip : skip + 2] != b"\xff\x25":
                return address
            slot = address + skip + 6 + int.from_bytes(code[skip + 2 : skip + 6], "little", signed=True)
            address = int.from_bytes(read(slot, 8), "little")
        return address

    def rule(self, address: int) -> library.Rule | None:
        """The rule of a function, if it has one."""
        found = self.rules.get(self.resolved(address))
        if found is None and (self.constants or self.custom):
            target = self.resolved(address)
            if target not in self._own:
                self._own[target] = self._users(target)
            found = self._own[target]
        return found

    def _users(self, target: int) -> library.Rule | None:
        module = self.decoder.maps.module(target)
        names = {s.name for s in module.symbols if s.start == target} if module else set()
        names |= {n for n in (*self.constants, *self.custom) if library.external(n) == target}
        for name in names & set(self.custom):
            return library.Rule(name, mathematics.users(name, target, *self.custom[name]))
        for name in names & set(self.constants):
            return library.Rule(name, system.constant(name, target))
        return None

    def closed(self, target: int, site: int) -> str | None:
        """Why a function is not lifted; "" where running has to find it first, None where it is lifted."""
        maps = self.decoder.maps
        if not maps.executable(target):
            return f"calls {target:#x}, where there is no code"
        module, own = maps.module(target), maps.module(site)
        symbol = module.symbol(target) if module else None
        if symbol is not None and (kind := library.LEAVING.match(symbol.name)):
            what = "C++ exceptions" if kind[1] else "jumps out of functions"
            return f"calls {symbol.name}: {what}, which are not carried"
        if symbol is not None and symbol.start == target and library.ENDING.match(symbol.name):
            return f"calls {symbol.name}, which ends the program"
        if module is not None and library.SYSTEM.match(module.name):
            name = symbol.name if symbol else f"{target - module.base:#x}"
            if module.name.startswith("libc.") and (name in library.LIFTED or module is own and symbol is None):
                return None
            return (
                f"calls {name} of {module.name}, which has no rule. If its result does not depend on what carries "
                f"derivatives: constant=[{name!r}]. If it is a function of one double, give its first and second "
                f"derivative: rules={{{name!r}: (f1, f2)}}"
            )
        return None if module is own or target in self.opened else ""

    def jumps(self, site: int) -> tuple[int, ...]:
        """Where an indirect call or jump is known to lead."""
        return tuple(self.known.get(site, ()))

    def elsewhere(self, entry: int, target: int) -> bool:
        """Whether a jump leaves a function, as a call at its end does."""
        if target in self.functions and target != entry:
            return True
        resolved = self.resolved(target)
        if resolved != target or resolved in self.rules:
            return True
        maps = self.decoder.maps
        module = maps.module(target)
        if module is not maps.module(entry):
            return True
        if module is None:
            return False
        symbol, own = module.symbol(target), module.symbol(entry)
        return (
            symbol is not None
            and own is not None
            and symbol.start == target
            and symbol.start != own.start
            and ".cold" not in symbol.name
        )

    def learn(self, site: int, target: int) -> bool:
        """Note what running has found; whether it is new."""
        target = target & MASK
        new = target not in self.opened or target not in self.known.get(site, ())
        instruction = self.decoder.at(site)
        self.opened.add(self.resolved(target))
        self.opened.add(target)
        if instruction.flow == "call":
            return new
        row = self.known.setdefault(site, [])
        for t in [target, *(self._jump_table(site, target) if instruction.flow == "indirect jump" else ())]:
            if t not in row:
                row.append(t)
        return new

    def follow(self, address: int) -> bool:
        """Give the mapping that an address lies in a shadow, if it has none. It is memory from before the call."""
        region = Maps().at(address)
        if region is None or "w" not in region.rights or region.end - region.start > 1 << 32:
            return False
        place = region.start, region.end
        if place in self.followed:
            return False
        self.followed = {(a, b) for a, b in self.followed if b <= place[0] or place[1] <= a} | {place}
        return True

    def _jump_table(self, site: int, target: int) -> list[int]:
        """Further targets of a switch: the table that holds this one, whose address the function computes."""
        owner = next((f for f in self.functions.values() if any(i.address == site for i in f.instructions)), None)
        if owner is None:
            return []
        low = min(i.address for i in owner.instructions)
        module = self.decoder.maps.module(site)
        symbol = module.symbol(site) if module else None
        high = symbol.start + symbol.size if symbol and symbol.size else max(i.end for i in owner.instructions) + 4096
        bases = {v.offset for i in owner.instructions for o in i.ops for v in o.inputs if v.space.name == "const"}
        maps, found = self.decoder.maps, []
        for base in sorted(bases):
            if not maps.constant(base, 4) or maps.executable(base):
                continue
            row = []
            for n in range(1024):
                if not maps.constant(base + 4 * n, 4):
                    break
                t = base + int.from_bytes(read(base + 4 * n, 4), "little", signed=True)
                if not low <= t < high:
                    break
                row.append(t)
            if target in row:
                found += row
        return found

    # --- the functions ------------------------------------------------------------------------------------

    def discover(self) -> None:
        """Follow the code from the entry, and from what running has found."""
        self.functions = {}
        todo = [self.entry]
        while todo:
            entry = todo.pop()
            if entry in self.functions:
                continue
            if entry == self.entry and self.rule(entry) is not None:
                self.functions[entry] = decode.stub(entry)
                continue
            made = decode.function(
                self.decoder, entry, lambda t, e=entry: self.elsewhere(e, t), lambda site: self.jumps(site)
            )
            self.functions[entry] = made
            todo += [t for t in self._callees(made) if t not in self.functions]
        self._profile()

    def _callees(self, f: decode.Function) -> list[int]:
        found = []
        for i in f.instructions:
            targets: tuple[int, ...] = ()
            if i.flow == "call" or i.flow in ("jump", "branch") and i.target and self.elsewhere(f.entry, i.target):
                targets = (i.target,) if i.target is not None else ()
            elif i.flow == "indirect call":
                targets = self.jumps(i.address)
                v = i.ops[-1].inputs[0]
                if v.space.name == "ram" and self.decoder.maps.constant(v.offset, 8):
                    targets = (int.from_bytes(read(v.offset, 8), "little"),)
            elif i.flow == "indirect jump":
                targets = tuple(t for t in self.jumps(i.address) if self.elsewhere(f.entry, t))
            for t in targets:
                rule = self.rule(t)
                if rule is not None:
                    if rule.name == "GOMP_parallel":
                        found += list(self.jumps(i.address))
                    continue
                t = self.resolved(t)
                if self.closed(t, i.address) is None:
                    found.append(t)
        return found

    def _profile(self) -> None:
        reads, writes, calls = {}, {}, {}
        for entry, f in self.functions.items():
            reads[entry], writes[entry] = touched(f)
            writes[entry] |= {"rax", "rdx", "x0.0"} if any(i.flow != "next" for i in f.instructions) else set()
            calls[entry] = [t for t in self._callees(f) if t in self.functions]
        changed = True
        while changed:
            changed = False
            for entry, called in calls.items():
                for t in called:
                    for own, other in ((reads, reads[t]), (writes, writes[t])):
                        if not other <= own[entry]:
                            own[entry] |= other
                            changed = True
        for entry in self.functions:
            # What rules read of the caller's registers may come from its own caller.
            args = reads[entry] | {"rdi", "rsi", "rdx", "rsp", "x0.0", "x1.0", "x2.0"}
            self.profiles[entry] = Profile(
                tuple(k for k in (*INTEGERS, *DOUBLES) if k in args),
                tuple(k for k in RETURNED if k in writes[entry]),
                tuple(sorted(writes[entry] - PRESERVED - set(RETURNED))),
            )

    def describe(self, why: str, address: int, name: str) -> NativeCodeError:
        """An error at an instruction."""
        where, line = described(self.decoder.maps, address)
        instruction = str(self.decoder.at(address))
        text = f"{name} {why}\n  at {where}: {instruction}" + (f"\n  {line}" if line else "")
        text += (
            "\n  Hand its derivatives over in another way: jetplane.register_native(f, signature, jvp=…), jets in its "
            "source (jetplane.native.include()), or, by differences, jetplane.blackbox"
        )
        return NativeCodeError(text, where, instruction, line)
