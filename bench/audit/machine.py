"""Reads compiled code: accesses to global memory in LLVM IR, instructions in SASS and AMD's assembly, products in Triton's IR."""

import re
from typing import NamedTuple


class Access(NamedTuple):
    """An instruction that accesses global memory."""

    pointer: str  # the name of the kernel's pointer
    kind: str  # "load", "store" or "async"
    width: int  # bytes per thread


_ASM = re.compile(r'asm sideeffect "[^"]*?\b(ld\.global|st\.global|cp\.async\.c[ag]\.shared\.global)([^"]*)"(.*)')
_BUFFER = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.(\w+)\((.*)")
_PLAIN = re.compile(r"\b(load|store) (<[^>]*>|\w+)(?: %[\w.]+)?, (ptr addrspace\(1\).*)")
_POINTER = re.compile(r"\s*(%[\w.]+) = (?:getelementptr|phi|select|freeze|addrspacecast|.*make\.buffer\.rsrc)\b(.*)")
_REGISTER = re.compile(r"%[\w.]+")
_KINDS = {"ld.global": "load", "st.global": "store", "load": "load", "store": "store"}


def accesses(llir: str, pointers: list[str]) -> list[Access]:
    """Accesses to global memory in LLVM IR; `pointers` are the names of the kernel's pointers, in order."""
    lines = llir.splitlines()
    parameters = re.findall(r"ptr addrspace\(1\)[^%]*(%[\w.]+)", next(line for line in lines if line.startswith("define")))
    origin = dict(zip(parameters, pointers, strict=False))  # which parameter a pointer was computed from; the last ones are Triton's own
    computed = [match.groups() for match in map(_POINTER.match, lines) if match]
    known = 0
    while known < len(origin):  # again, until loops have gone round
        known = len(origin)
        for register, operands in computed:
            for operand in _REGISTER.findall(operands):
                if operand in origin:
                    origin[register] = origin[operand]

    found = []
    for line in lines:
        if match := _ASM.search(line):
            instruction, suffix, operands = match.groups()
            kind = _KINDS.get(instruction, "async")
            if kind == "async":
                width = int(re.search(r"\], \[.*?\], (\w+)", suffix)[1], 16)
            else:
                lanes, bits = re.search(r"(?:\.v(\d+))?\.[bfsu](\d+) ", suffix).groups()
                width = int(lanes or 1) * int(bits) // 8
        elif match := _BUFFER.search(line) or _PLAIN.search(line):
            kind, type_, operands = match.groups()
            width = _type_bytes(type_)
        else:
            continue
        found += [Access(origin[register], kind, width) for register in _REGISTER.findall(operands) if register in origin]
    return found


def _type_bytes(name: str) -> int:
    """Of v4i32, <8 x bfloat>, float, i16, ..."""
    lanes, vector, kind, bits = re.fullmatch(r"(?:<(\d+) x |v(\d+))?([a-z]+)(\d*)>?", name).groups()
    return int(lanes or vector or 1) * (int(bits) // 8 if bits else {"half": 2, "bfloat": 2, "float": 4, "double": 8}[kind])


class Work(NamedTuple):
    """What a thread does in the loops over rows of a kernel, each counted once; in a kernel without such a loop, in all of it."""

    instructions: int
    loaded: int  # bytes from global memory
    stored: int
    loops: bool


_SASS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([\w.]+)([^;]*)", re.MULTILINE)
_LOAD = re.compile(r"(LDG|LDGSTS)\b|(global|buffer)_load")
_STORE = re.compile(r"STG\b|(global|buffer)_store")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b|_(byte|short|dwordx2|dwordx3|dwordx4)")
_BYTES = {"8": 1, "16": 2, "64": 8, "128": 16, "byte": 1, "short": 2, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def work(code: str) -> Work:
    """Reads SASS or AMD's assembly. Loops that touch no global memory, in which a thread waits for others, are no loops here."""
    found = _sass(code) or _amdgcn(code)
    loops = [(target, i) for i, (_, target) in enumerate(found) if target is not None and target < i]
    loops = [(first, last) for first, last in loops if any(_LOAD.match(name) or _STORE.match(name) for name, _ in found[first : last + 1])]
    inside = [name for i, (name, _) in enumerate(found) if not loops or any(first <= i <= last for first, last in loops)]
    inside = [name for name in inside if name not in ("NOP", "s_nop", "s_endpgm")]
    loaded, stored = (sum(map(_bytes, filter(kind.match, inside))) for kind in (_LOAD, _STORE))
    return Work(len(inside), loaded, stored, bool(loops))


def _bytes(instruction: str) -> int:
    width = _WIDTH.search(instruction)
    return _BYTES[width[1] or width[2]] if width else 4


def _sass(code: str) -> list[tuple[str, int | None]]:
    """Instructions of SASS: names, and the places in the list to which they jump."""
    found = _SASS.findall(code)
    places = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
    jumps = [re.search(r"\b0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None for _, name, rest in found]
    return [(name, places.get(int(jump[1], 16)) if jump else None) for (_, name, _), jump in zip(found, jumps, strict=True)]


def _amdgcn(code: str) -> list[tuple[str, int | None]]:
    """The same of AMD's assembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)\s*(.*)", line):
            found.append((match[1], match[2].split()[0] if match[1].startswith(("s_cbranch", "s_branch")) else ""))
    return [(name, labels.get(label)) for name, label in found]


def narrow_products(ttir: str) -> list[str]:
    """Multiplications in 32 bits other than of a scalar with a constant, in Triton's IR: row offsets have to be 64-bit."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"(arith\.muli (\S+), (\S+) : (?:tensor<[^>]*xi32>|i32))", ttir)
    return [product for product, *operands in products if "tensor" in product or not constants & set(operands)]
