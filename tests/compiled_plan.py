"""What a compiled K-step call must not hold: read off XLA's optimised program text."""

import math
import re

INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\]")
MOVES = {"copy", "copy-start", "transpose", "slice", "dynamic-slice", "concatenate", "pad", "reshape", "gather"}
HOST = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}


def computations(text: str) -> dict[str, list[str]]:
    """Instruction lines by computation name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            found[name] = []
        elif name and INSTRUCTION.match(line):
            found[name].append(line)
    return found


def faults(text: str, sizes: set[tuple[str, int]], conditionals: bool = False) -> list[str]:
    """Every fault of a plan, a line each.

    Args:
      text: the optimised program (`Compiled.as_text()`).
      sizes: (dtype, number of elements) of the weights and of the pages: nothing of that size may be moved.
      conditionals: whether the role conditional of `inline` is allowed.
    """
    wrong = []
    for name, lines in computations(text).items():
        opcodes = [INSTRUCTION.match(line)["opcode"] for line in lines]  # type: ignore[index]
        is_product = "dot" in opcodes  # a matmul fusion reads its operands in place, whatever their layout
        for line, opcode in zip(lines, opcodes, strict=True):
            if opcode in HOST or "callback" in line:
                wrong.append(f"host: {line.strip()[:160]}")
            if "S(5)" in line.split("(", 1)[0]:
                wrong.append(f"host memory: {line.strip()[:160]}")
            if opcode == "conditional" and not conditionals:
                wrong.append(f"conditional: {line.strip()[:160]}")
            if opcode == "while" and "known_trip_count" not in line:
                wrong.append(f"loop predicate read on the host: {line.strip()[:160]}")
            if opcode in MOVES and not is_product and _size(line) in sizes:
                wrong.append(f"moves a weight or the cache: in {name}: {line.strip()[:160]}")
    return wrong


def _size(line: str) -> tuple[str, int]:
    array = ARRAY.match(INSTRUCTION.match(line)["type"].lstrip("("))  # type: ignore[index]
    if array is None:
        return ("", 0)
    return array["dtype"], math.prod(int(d) for d in array["dims"].split(",") if d)
