"""The functions of lifted code that read and write the coefficients of what is in memory.

What code may write lies in one arena with a linear shadow. One rotation and one comparison of ``address - arena`` tell
whether an address is in the arena and aligned. Libraries' own data, and memory that they have allocated before, have
shadows as well, found more slowly; elsewhere nothing is active.

A store of less than a whole double leaves a mark, a NaN of its own as the first coefficient, whose last 8 bits tell
which bytes still belong to an active double. The other bytes may be read as integers; read as a double they give NaN,
never a silent zero.
"""

from __future__ import annotations

from .arena import END, EXIT, FREE, FULL, HEAP, MEMORY, REFUSED, REGIONS, SITE, TABLE, TARGET, TRAP
from .coefficients import Layout

MARK = 0x7FF86A6574706C00  # a quiet NaN; the last byte is a set of bytes


def functions(layout: Layout, size: int) -> str:
    """The functions of a module that know how memory is laid out."""
    types, stride = layout.types, 8 * layout.stride
    offsets = [8 * o for o in layout.offsets]
    arguments = ", ".join(f"{t} %c{n}" for n, t in enumerate(types))
    passed = arguments
    out: list[str] = [
        "@jp_arena = external global i8",
        "@jp_shadow = external global i8",
        "@jp_state = external global i8",
        f"@jp_zero = internal constant [{layout.stride + 8} x i64] zeroinitializer, align 64",
        f"@jp_spoiled = internal constant [{layout.stride + 8} x i64] ["
        + ", ".join(f"i64 {MARK | 255}" for _ in range(layout.stride + 8))
        + "], align 64",
        "declare i64 @llvm.fshr.i64(i64, i64, i64)",
        "declare i64 @llvm.ctlz.i64(i64, i1)",
        "declare i64 @llvm.umax.i64(i64, i64)",
        "declare i64 @llvm.umin.i64(i64, i64)",
        "declare i64 @llvm.usub.sat.i64(i64, i64)",
        "declare ptr @memmove(ptr, ptr, i64)",
        "declare ptr @memset(ptr, i32, i64)",
    ]
    # --- whether coefficients are anything but zero, or a mark
    bits = []
    names = []
    for n, (t, w) in enumerate(zip(types, layout.widths, strict=True)):
        if w == 1:
            bits.append(f"  %i{n} = bitcast double %c{n} to i64")
            names.append(f"%i{n}")
        else:
            bits.append(f"  %j{n} = bitcast {t} %c{n} to <{w} x i64>")
            bits.append(f"  %i{n} = call i64 @llvm.vector.reduce.or.v{w}i64(<{w} x i64> %j{n})")
            names.append(f"%i{n}")
    last = names[0]
    for n, name in enumerate(names[1:]):
        bits.append(f"  %o{n} = or i64 {last}, {name}")
        last = f"%o{n}"
    if layout.widths[0] == 1:
        first = "  %first = bitcast double %c0 to i64"
    else:
        first = f"  %f0 = extractelement {types[0]} %c0, i32 0\n  %first = bitcast double %f0 to i64"
    out.append(
        f"define internal i1 @jp_active({arguments}) alwaysinline memory(none) nounwind willreturn {{\n"
        + "\n".join(bits)
        + f"\n  %s = shl i64 {last}, 1\n  %some = icmp ne i64 %s, 0\n{first}\n"
        f"  %whole = icmp ne i64 %first, {MARK}\n  %r = and i1 %some, %whole\n  ret i1 %r\n}}"
    )
    # --- an error that does not stop the program: its values stay right, and the first one is told at the end
    out.append(
        f"""define internal void @jp_trap(i64 %site) noinline cold nounwind {{
  %p = getelementptr i8, ptr @jp_state, i64 {8 * TRAP}
  %old = load i64, ptr %p
  %none = icmp eq i64 %old, 0
  %new = add i64 %site, 1
  %v = select i1 %none, i64 %new, i64 %old
  store i64 %v, ptr %p
  ret void
}}
define internal void @jp_leave(i64 %why, i64 %site, i64 %target) noinline cold nounwind {{
  %p = getelementptr i8, ptr @jp_state, i64 {8 * EXIT}
  %old = load i64, ptr %p
  %first = icmp eq i64 %old, 0
  br i1 %first, label %note, label %end
note:
  store i64 %why, ptr %p
  %q = getelementptr i8, ptr @jp_state, i64 {8 * SITE}
  store i64 %site, ptr %q
  %r = getelementptr i8, ptr @jp_state, i64 {8 * TARGET}
  store i64 %target, ptr %r
  ret void
end:
  ret void
}}"""
    )
    # --- where the coefficients of an address are
    out.append(
        f"""define internal ptr @jp_in_region(i64 %a, i64 %size) noinline cold memory(read) nounwind willreturn {{
entry:
  %np = getelementptr i8, ptr @jp_state, i64 {8 * REGIONS}
  %n = load i64, ptr %np
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %next]
  %end = icmp uge i64 %i, %n
  br i1 %end, label %none, label %look
look:
  %at = mul i64 %i, 24
  %off = add i64 %at, {8 * TABLE}
  %p = getelementptr i8, ptr @jp_state, i64 %off
  %start = load i64, ptr %p
  %p1 = getelementptr i8, ptr %p, i64 8
  %len = load i64, ptr %p1
  %p2 = getelementptr i8, ptr %p, i64 16
  %sh = load i64, ptr %p2
  %d = sub i64 %a, %start
  %last = call i64 @llvm.usub.sat.i64(i64 %len, i64 %size)
  %fits = icmp ule i64 %size, %len
  %inside = icmp ule i64 %d, %last
  %in = and i1 %fits, %inside
  %i1 = add i64 %i, 1
  br i1 %in, label %found, label %next
next:
  br label %loop
found:
  %g = lshr i64 %d, 3
  %o = mul i64 %g, {stride}
  %r = add i64 %sh, %o
  %rp = inttoptr i64 %r to ptr
  ret ptr %rp
none:
  ret ptr null
}}
define internal ptr @jp_granules(i64 %a, i64 %size) noinline memory(read) nounwind willreturn {{
  ; coefficients of the doubles that [a, a + size) lies in, or null
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %in = icmp ult i64 %off, {size}
  br i1 %in, label %here, label %there
here:
  %g = lshr i64 %off, 3
  %o = mul i64 %g, {stride}
  %p = getelementptr i8, ptr @jp_shadow, i64 %o
  ret ptr %p
there:
  %q = call ptr @jp_in_region(i64 %a, i64 %size)
  ret ptr %q
}}
define internal i1 @jp_in_part(i64 %a, i64 %size) noinline cold memory(read) nounwind willreturn {{
  ; whether [a, a + size) lies in a region that is followed, but not as a whole
entry:
  %np = getelementptr i8, ptr @jp_state, i64 {8 * REGIONS}
  %n = load i64, ptr %np
  %end = add i64 %a, %size
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %look]
  %over = icmp uge i64 %i, %n
  br i1 %over, label %no, label %look
look:
  %at = mul i64 %i, 24
  %off = add i64 %at, {8 * TABLE}
  %p = getelementptr i8, ptr @jp_state, i64 %off
  %start = load i64, ptr %p
  %p1 = getelementptr i8, ptr %p, i64 8
  %len = load i64, ptr %p1
  %stop = add i64 %start, %len
  %before = icmp ult i64 %a, %stop
  %behind = icmp ult i64 %start, %end
  %both = and i1 %before, %behind
  %i1 = add i64 %i, 1
  br i1 %both, label %yes, label %loop
yes:
  %g = call ptr @jp_in_region(i64 %a, i64 %size)
  %r = icmp eq ptr %g, null
  ret i1 %r
no:
  ret i1 false
}}
define internal void @jp_whole(i64 %a, i64 %size, i64 %site) noinline cold nounwind {{
  ; of a block of memory all or nothing may be followed
  %part = call i1 @jp_in_part(i64 %a, i64 %size)
  br i1 %part, label %bad, label %end
bad:
  call void @jp_leave(i64 {REFUSED}, i64 %site, i64 0)
  ret void
end:
  ret void
}}
define internal i1 @jp_any(ptr %p, i64 %n) noinline memory(read) nounwind willreturn mustprogress {{
  ; whether any of n doubles is active
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %go]
  %end = icmp uge i64 %i, %n
  br i1 %end, label %no, label %look
look:
  %o = mul i64 %i, {stride}
  %q = getelementptr i8, ptr %p, i64 %o
"""
        + _loads(types, offsets, "%q")
        + f"""
  %act = call i1 @jp_active({passed})
  %i1 = add i64 %i, 1
  br i1 %act, label %yes, label %go
go:
  br label %loop
yes:
  ret i1 true
no:
  ret i1 false
}}
define internal i64 @jp_covered(i64 %a, i64 %size) alwaysinline memory(none) nounwind willreturn {{
  %low = and i64 %a, 7
  %s = add i64 %low, %size
  %t = add i64 %s, 7
  %n = lshr i64 %t, 3
  ret i64 %n
}}
define internal ptr @jp_elsewhere(i64 %a) noinline cold memory(read) nounwind willreturn {{
  %p = call ptr @jp_granules(i64 %a, i64 8)
  %null = icmp eq ptr %p, null
  br i1 %null, label %none, label %some
some:
  %low = and i64 %a, 7
  %aligned = icmp eq i64 %low, 0
  br i1 %aligned, label %found, label %across
across:
  %act = call i1 @jp_any(ptr %p, i64 2)
  br i1 %act, label %bad, label %none
found:
  ret ptr %p
bad:
  ret ptr @jp_spoiled
none:
  ret ptr @jp_zero
}}
define internal ptr @jp_shadow_of(i64 %a) alwaysinline memory(read) nounwind willreturn {{
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %g = call i64 @llvm.fshr.i64(i64 %off, i64 %off, i64 3)
  %in = icmp ult i64 %g, {size // 8}
  br i1 %in, label %here, label %there, !prof !1
here:
  %o = mul i64 %g, {stride}
  %p = getelementptr i8, ptr @jp_shadow, i64 %o
  br label %end
there:
  %q = call ptr @jp_elsewhere(i64 %a)
  br label %end
end:
  %r = phi ptr [%p, %here], [%q, %there]
  ret ptr %r
}}"""
    )
    # --- loads and stores
    structure = "{ " + ", ".join(types) + " }"
    loads = _loads(types, offsets, "%p")
    packed = []
    last = "poison"
    for n, t in enumerate(types):
        packed.append(f"  %r{n} = insertvalue {structure} {last}, {t} %c{n}, {n}")
        last = f"%r{n}"
    out.append(
        f"""define internal {structure} @jp_load(i64 %a) alwaysinline memory(read) nounwind willreturn {{
  %p = call ptr @jp_shadow_of(i64 %a)
{loads}
{chr(10).join(packed)}
  ret {structure} {last}
}}
define internal void @jp_store_elsewhere(i64 %a, i64 %site, {arguments}) noinline cold nounwind {{
  %p = call ptr @jp_granules(i64 %a, i64 8)
  %null = icmp eq ptr %p, null
  %low = and i64 %a, 7
  %aligned = icmp eq i64 %low, 0
  %act = call i1 @jp_active({passed})
  br i1 %null, label %outside, label %inside
inside:
  br i1 %aligned, label %whole, label %across
whole:
{_stores(types, offsets, "%p")}
  ret void
across:
  call void @jp_mark_elsewhere(i64 %a, i64 8)
  br i1 %act, label %bad, label %end
outside:
  br i1 %act, label %unfollowed, label %end
unfollowed:
  call void @jp_leave(i64 {MEMORY}, i64 %site, i64 %a)
  ret void
bad:
  call void @jp_trap(i64 %site)
  ret void
end:
  ret void
}}
define internal void @jp_store(i64 %a, i64 %site, {arguments}) alwaysinline nounwind {{
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %g = call i64 @llvm.fshr.i64(i64 %off, i64 %off, i64 3)
  %in = icmp ult i64 %g, {size // 8}
  br i1 %in, label %here, label %there, !prof !1
here:
  %o = mul i64 %g, {stride}
  %p = getelementptr i8, ptr @jp_shadow, i64 %o
{_stores(types, offsets, "%p")}
  br label %end
there:
  call void @jp_store_elsewhere(i64 %a, i64 %site, {passed})
  br label %end
end:
  ret void
}}
define internal i64 @jp_bytes({arguments}) alwaysinline memory(none) nounwind willreturn {{
  ; which bytes belong to an active double
{first}
  %family = and i64 %first, -256
  %marked = icmp eq i64 %family, {MARK}
  %left = and i64 %first, 255
  %act = call i1 @jp_active({passed})
  %all = select i1 %act, i64 255, i64 0
  %r = select i1 %marked, i64 %left, i64 %all
  ret i64 %r
}}
define internal void @jp_guard(i64 %site, i64 %bytes, {arguments}) alwaysinline nounwind {{
  ; a double of which these bytes are used as an integer must not be active
  %active = call i64 @jp_bytes({passed})
  %both = and i64 %active, %bytes
  %act = icmp ne i64 %both, 0
  br i1 %act, label %bad, label %end, !prof !0
bad:
  call void @jp_trap(i64 %site)
  br label %end
end:
  ret void
}}
define internal void @jp_check(i64 %a, i64 %size, i64 %site) alwaysinline nounwind {{
  ; bytes that are read as something else than a double must not be those of an active one
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %low = and i64 %a, 7
  %s = add i64 %low, %size
  %one = icmp ule i64 %s, 8
  %in = icmp ult i64 %off, {size}
  %fast = and i1 %one, %in
  br i1 %fast, label %here, label %there, !prof !1
here:
  %g = lshr i64 %off, 3
  %o = mul i64 %g, {stride}
  %p = getelementptr i8, ptr @jp_shadow, i64 %o
{loads}
  %ones = shl i64 1, %size
  %mask = sub i64 %ones, 1
  %bytes = shl i64 %mask, %low
  call void @jp_guard(i64 %site, i64 %bytes, {passed})
  br label %end
there:
  call void @jp_check_slowly(i64 %a, i64 %size, i64 %site)
  br label %end
end:
  ret void
}}
define internal void @jp_check_slowly(i64 %a, i64 %size, i64 %site) noinline nounwind {{
  %p = call ptr @jp_granules(i64 %a, i64 %size)
  %null = icmp eq ptr %p, null
  br i1 %null, label %end, label %look
look:
  %n = call i64 @jp_covered(i64 %a, i64 %size)
  %act = call i1 @jp_any(ptr %p, i64 %n)
  br i1 %act, label %bad, label %end
bad:
  call void @jp_trap(i64 %site)
  ret void
end:
  ret void
}}
define internal void @jp_overwrite(ptr %p, i64 %bytes) alwaysinline nounwind {{
  ; these bytes of a double hold something else now
  %first = load i64, ptr %p, align 8, !tbaa !3
  %family = and i64 %first, -256
  %marked = icmp eq i64 %family, {MARK}
  br i1 %marked, label %again, label %whole, !prof !1
whole:
  %act = call i1 @jp_any(ptr %p, i64 1)
  %all = select i1 %act, i64 255, i64 0
  br label %again
again:
  %old = phi i64 [%first, %0], [%all, %whole]
  %written = xor i64 %bytes, -1
  %kept = and i64 %old, 255
  %left = and i64 %kept, %written
  %new = or i64 %left, {MARK}
  store i64 %new, ptr %p, align 8, !tbaa !3
  ret void
}}
define internal void @jp_mark_elsewhere(i64 %a, i64 %size) noinline cold nounwind {{
entry:
  %p = call ptr @jp_granules(i64 %a, i64 %size)
  %null = icmp eq ptr %p, null
  %n = call i64 @jp_covered(i64 %a, i64 %size)
  %low = and i64 %a, 7
  %end8 = add i64 %low, %size
  br i1 %null, label %end, label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %loop]
  %o = mul i64 %i, {stride}
  %q = getelementptr i8, ptr %p, i64 %o
  ; bytes [max(low - 8 i, 0), min(low + size - 8 i, 8)) of the double i
  %at = shl i64 %i, 3
  %from_ = call i64 @llvm.usub.sat.i64(i64 %low, i64 %at)
  %to_ = sub i64 %end8, %at
  %to = call i64 @llvm.umin.i64(i64 %to_, i64 8)
  %upto = shl i64 1, %to
  %below = shl i64 1, %from_
  %bytes = sub i64 %upto, %below
  call void @jp_overwrite(ptr %q, i64 %bytes)
  %i1 = add i64 %i, 1
  %more = icmp ult i64 %i1, %n
  br i1 %more, label %loop, label %end
end:
  ret void
}}
define internal void @jp_mark(i64 %a, i64 %size) alwaysinline nounwind {{
  ; bytes of less than a whole double were written
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %low = and i64 %a, 7
  %s = add i64 %low, %size
  %one = icmp ule i64 %s, 8
  %in = icmp ult i64 %off, {size}
  %fast = and i1 %one, %in
  br i1 %fast, label %here, label %there, !prof !1
here:
  %g = lshr i64 %off, 3
  %o = mul i64 %g, {stride}
  %p = getelementptr i8, ptr @jp_shadow, i64 %o
  %ones = shl i64 1, %size
  %mask = sub i64 %ones, 1
  %bytes = shl i64 %mask, %low
  call void @jp_overwrite(ptr %p, i64 %bytes)
  br label %end
there:
  call void @jp_mark_elsewhere(i64 %a, i64 %size)
  br label %end
end:
  ret void
}}"""
    )
    # --- blocks of memory
    out.append(
        f"""define internal void @jp_clear(i64 %a, i64 %n, i64 %site) noinline nounwind {{
  ; [a, a + n) holds constants now
  %some = icmp ne i64 %n, 0
  br i1 %some, label %go, label %end
go:
  %p = call ptr @jp_granules(i64 %a, i64 %n)
  %null = icmp eq ptr %p, null
  br i1 %null, label %out, label %fill
out:
  call void @jp_whole(i64 %a, i64 %n, i64 %site)
  ret void
fill:
  %low = and i64 %a, 7
  %head = sub i64 8, %low
  %h = and i64 %head, 7
  %hs = icmp ult i64 %h, %n
  %h1 = select i1 %hs, i64 %h, i64 %n
  %hm = icmp ne i64 %h1, 0
  br i1 %hm, label %markhead, label %body
markhead:
  call void @jp_mark(i64 %a, i64 %h1)
  br label %body
body:
  %a1 = add i64 %a, %h1
  %n1 = sub i64 %n, %h1
  %whole = lshr i64 %n1, 3
  %any = icmp ne i64 %whole, 0
  br i1 %any, label %zero, label %tail
zero:
  %bytes = mul i64 %whole, {stride}
  %q = call ptr @jp_granules(i64 %a1, i64 8)
  %r = call ptr @memset(ptr %q, i32 0, i64 %bytes)
  br label %tail
tail:
  %left = and i64 %n1, 7
  %w8 = shl i64 %whole, 3
  %a2 = add i64 %a1, %w8
  %t = icmp ne i64 %left, 0
  br i1 %t, label %marktail, label %end
marktail:
  call void @jp_mark(i64 %a2, i64 %left)
  ret void
end:
  ret void
}}
define internal void @jp_set(i64 %a, i8 %value, i64 %n, i64 %site) noinline nounwind {{
  %p = inttoptr i64 %a to ptr
  %v = zext i8 %value to i32
  %r = call ptr @memset(ptr %p, i32 %v, i64 %n)
  call void @jp_clear(i64 %a, i64 %n, i64 %site)
  ret void
}}
define internal void @jp_copy(i64 %d, i64 %s, i64 %n, i64 %site) noinline nounwind {{
  %some = icmp ne i64 %n, 0
  br i1 %some, label %go, label %end
go:
  %dp = inttoptr i64 %d to ptr
  %sp = inttoptr i64 %s to ptr
  %v = call ptr @memmove(ptr %dp, ptr %sp, i64 %n)
  %ps = call ptr @jp_granules(i64 %s, i64 %n)
  %none = icmp eq ptr %ps, null
  br i1 %none, label %constant, label %carried
constant:
  call void @jp_whole(i64 %s, i64 %n, i64 %site)
  call void @jp_clear(i64 %d, i64 %n, i64 %site)
  ret void
carried:
  %pd = call ptr @jp_granules(i64 %d, i64 %n)
  %out = icmp eq ptr %pd, null
  %both = or i64 %d, %s
  %low = and i64 %both, 7
  %odd = icmp ne i64 %low, 0
  %slow = or i1 %out, %odd
  br i1 %slow, label %pieces, label %fast
pieces:
  ; not whole doubles: allowed where none of them is active
  call void @jp_check(i64 %s, i64 %n, i64 %site)
  call void @jp_clear(i64 %d, i64 %n, i64 %site)
  ret void
fast:
  %whole = lshr i64 %n, 3
  %bytes = mul i64 %whole, {stride}
  %r = call ptr @memmove(ptr %pd, ptr %ps, i64 %bytes)
  %left = and i64 %n, 7
  %t = icmp ne i64 %left, 0
  br i1 %t, label %tail, label %end
tail:
  %w8 = shl i64 %whole, 3
  %s2 = add i64 %s, %w8
  %d2 = add i64 %d, %w8
  call void @jp_check(i64 %s2, i64 %left, i64 %site)
  call void @jp_mark(i64 %d2, i64 %left)
  ret void
end:
  ret void
}}
define internal i64 @jp_allocate(i64 %n) noinline nounwind {{
  ; a block of a power of two bytes, with its logarithm 16 bytes ahead of it; the free ones of a size are a list
  %m = call i64 @llvm.umax.i64(i64 %n, i64 32)
  %m1 = sub i64 %m, 1
  %z = call i64 @llvm.ctlz.i64(i64 %m1, i1 false)
  %c = sub i64 64, %z
  %ci = mul i64 %c, 8
  %co = add i64 %ci, {8 * FREE}
  %fp = getelementptr i8, ptr @jp_state, i64 %co
  %head = load i64, ptr %fp
  %has = icmp ne i64 %head, 0
  br i1 %has, label %take, label %grow
take:
  %hp = inttoptr i64 %head to ptr
  %next = load i64, ptr %hp
  store i64 %next, ptr %fp
  ret i64 %head
grow:
  %tp = getelementptr i8, ptr @jp_state, i64 {8 * HEAP}
  %ep = getelementptr i8, ptr @jp_state, i64 {8 * END}
  %top = load i64, ptr %tp
  %end = load i64, ptr %ep
  %cs = icmp ult i64 %c, 40
  %shift = select i1 %cs, i64 %c, i64 40
  %size = shl i64 1, %shift
  %t16 = add i64 %top, 16
  %new = add i64 %t16, %size
  %ok = icmp ule i64 %new, %end
  br i1 %ok, label %fits, label %full
full:
  call void @jp_leave(i64 {FULL}, i64 0, i64 %n)
  ret i64 0
fits:
  store i64 %new, ptr %tp
  %top_ = inttoptr i64 %top to ptr
  store i64 %c, ptr %top_
  ret i64 %t16
}}
define internal void @jp_release(i64 %a) noinline nounwind {{
  %off = sub i64 %a, ptrtoint (ptr @jp_arena to i64)
  %in = icmp ult i64 %off, {size}
  br i1 %in, label %ours, label %end
ours:
  %h = sub i64 %a, 16
  %hp = inttoptr i64 %h to ptr
  %c = load i64, ptr %hp
  %ci = mul i64 %c, 8
  %co = add i64 %ci, {8 * FREE}
  %fp = getelementptr i8, ptr @jp_state, i64 %co
  %head = load i64, ptr %fp
  %ap = inttoptr i64 %a to ptr
  store i64 %head, ptr %ap
  store i64 %a, ptr %fp
  ret void
end:
  ret void
}}
define internal i64 @jp_zeroed(i64 %n) noinline nounwind {{
  %a = call i64 @jp_allocate(i64 %n)
  %ok = icmp ne i64 %a, 0
  br i1 %ok, label %fill, label %end
fill:
  call void @jp_set(i64 %a, i8 0, i64 %n, i64 0)
  ret i64 %a
end:
  ret i64 0
}}
define internal i64 @jp_grown(i64 %a, i64 %n, i64 %site) noinline nounwind {{
  %null = icmp eq i64 %a, 0
  br i1 %null, label %fresh, label %old
fresh:
  %f = call i64 @jp_allocate(i64 %n)
  ret i64 %f
old:
  %h = sub i64 %a, 16
  %hp = inttoptr i64 %h to ptr
  %c = load i64, ptr %hp
  %size = shl i64 1, %c
  %fits = icmp ule i64 %n, %size
  br i1 %fits, label %same, label %move
same:
  ret i64 %a
move:
  %b = call i64 @jp_allocate(i64 %n)
  %ok = icmp ne i64 %b, 0
  br i1 %ok, label %copy, label %same0
copy:
  call void @jp_copy(i64 %b, i64 %a, i64 %size, i64 %site)
  call void @jp_release(i64 %a)
  ret i64 %b
same0:
  ret i64 0
}}"""
    )
    return "\n".join(out)


METADATA = """!0 = !{!"branch_weights", i32 1, i32 1000}
!1 = !{!"branch_weights", i32 1000, i32 1}
!2 = !{!4, !4, i64 0}
!3 = !{!5, !5, i64 0}
!4 = !{!"guest", !6, i64 0}
!5 = !{!"coefficients", !6, i64 0}
!6 = !{!"jetplane"}"""


def _loads(types: tuple[str, ...], offsets: list[int], at: str) -> str:
    return "\n".join(
        f"  %p{n}_ = getelementptr i8, ptr {at}, i64 {o}\n  %c{n} = load {t}, ptr %p{n}_, align 8, !tbaa !3"
        for n, (t, o) in enumerate(zip(types, offsets, strict=True))
    )


def _stores(types: tuple[str, ...], offsets: list[int], at: str) -> str:
    return "\n".join(
        f"  %s{n}_ = getelementptr i8, ptr {at}, i64 {o}\n  store {t} %c{n}, ptr %s{n}_, align 8, !tbaa !3"
        for n, (t, o) in enumerate(zip(types, offsets, strict=True))
    )
