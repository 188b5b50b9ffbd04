"""The way that a whole chunk takes through the machine code of a kernel.

Chunks that their tensor ends in, and tensors that are walked row by row, have code of their own,
whose accesses are narrow. The blocks of a whole chunk are those with the widest accesses, what
leads to them, and what follows from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# Of the wide blocks that it leads through less than 0, how many instructions it has, the blocks.
Way = tuple[int, int, tuple[str, ...]]


@dataclass(frozen=True)
class Syntax:
    """How an assembly language writes what a program's way depends on.

    Attributes:
        label: begins a block; group 1 is its name.
        jump: goes elsewhere; group 1 is where to.
        always: a jump or the program's end, without a condition.
        instruction: what is an instruction at all.
        wide: an access of 128 bits.
    """

    label: re.Pattern[str]
    jump: re.Pattern[str]
    always: re.Pattern[str]
    instruction: re.Pattern[str]
    wide: re.Pattern[str]


PTX = Syntax(
    label=re.compile(r"^(\$L__BB\w+):"),
    jump=re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)"),
    always=re.compile(r"^\s*(?:bra|ret)\b"),
    instruction=re.compile(r"^\s+[a-z@][^;]*;"),
    wide=re.compile(r"\b(?:ld|st)\.global\S*(?:\.v4\.[bfsu]32|\.v2\.[bfsu]64)"),
)
SASS = Syntax(
    label=re.compile(r"^(\.L_x_\w+):"),
    jump=re.compile(r"\bBRA\S*\s[^`]*`\((\.L_x_\w+)\)"),
    # A condition may also stand behind the name.
    always=re.compile(r"\*/\s+(?:BRA\S*\s+`|EXIT|RET)"),
    instruction=re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)"),
    wide=re.compile(r"\b(?:LDG|STG)\S*\.128\b"),
)
AMD = Syntax(
    label=re.compile(r"^(\.LBB\w+):"),
    # What a mask of lanes is looked at for is no other way: a masked access that none takes.
    jump=re.compile(r"\bs_(?:branch|cbranch_(?!exec)\w+)\s+(\.LBB\w+)"),
    always=re.compile(r"^\s*(?:s_branch|s_endpgm)\b"),
    instruction=re.compile(r"^\s+(?:[sv]|ds|global|buffer|flat)_\w+"),
    wide=re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_dwordx4"),
)


_PRODUCT = re.compile(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b")


@dataclass
class Block:
    """Instructions that follow each other, up to one that may go elsewhere.

    Attributes:
        lines: the instructions.
        targets: names of the blocks that may come next.
        is_wide: whether one of them is an access of 128 bits.
        ends: whether what follows in the text is no continuation.
    """

    lines: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    is_wide: bool = False
    ends: bool = False


def whole_chunk(text: str, syntax: Syntax) -> tuple[list[str], list[str]]:
    """Return the instructions that a whole chunk takes, those up to its first block and the rest.

    Of several ways it is the shortest: rare cases of roots and quotients are branches of their own.
    Where no access is wide there are none.
    """
    blocks = _blocks(text.splitlines(), syntax)
    if not any(block.is_wide for block in blocks.values()):
        return [], []
    # Of the ways to a block: wide blocks on it (the most), instructions, and the blocks.
    best: dict[str, Way] = {next(iter(blocks)): (0, 0, ())}
    done: dict[str, Way] = {}
    for name, block in blocks.items():
        if name not in best:
            continue
        wide, count, names = best[name]
        found = done[name] = (wide - block.is_wide, count + len(block.lines), (*names, name))
        for target in block.targets:
            # No way goes twice through what lies before.
            if target not in done:
                best[target] = min(best.get(target, found), found)
    way = min(found for name, found in done.items() if blocks[name].ends)[2]
    # A kernel of tiles may have wide accesses on a way around.
    first = next((i for i, name in enumerate(way) if blocks[name].is_wide), len(way))
    lines = [
        [line for name in part for line in blocks[name].lines]
        for part in (way[:first], way[first:])
    ]
    return lines[0], lines[1]


def loop_of_products(text: str, syntax: Syntax) -> int | None:
    """Count the instructions of the shortest loop that has a matrix instruction; None without."""
    seen: dict[str, int] = {}
    # Instructions and products so far, behind each line.
    count = products = 0
    before: list[tuple[int, int]] = []
    found: list[int] = []
    for number, line in enumerate(text.splitlines()):
        before.append((count, products))
        label = syntax.label.search(line)
        if label is not None:
            seen[label[1]] = number
        elif syntax.instruction.search(line):
            count += 1
            products += bool(_PRODUCT.search(line))
            jump = syntax.jump.search(line)
            if jump is not None and jump[1] in seen:
                begin = before[seen[jump[1]]]
                found += [count - begin[0]] if products > begin[1] else []
    return min(found, default=None)


def _blocks(lines: Iterable[str], syntax: Syntax) -> dict[str, Block]:
    """Cut a text into blocks by name, in its order; those behind a jump are numbered."""
    current = Block()
    found = {"0": current}
    for line in lines:
        label = syntax.label.search(line)
        if label is not None:
            _begin(found, current, label[1])
            current = found[label[1]]
        elif syntax.instruction.search(line):
            current.lines.append(line)
            current.is_wide = current.is_wide or bool(syntax.wide.search(line))
            jump = syntax.jump.search(line)
            current.ends = bool(syntax.always.search(line))
            if jump is not None:
                current.targets.append(jump[1])
            if jump is not None or current.ends:
                _begin(found, current, str(len(found)))
                current = found[str(len(found) - 1)]
    # Behind the program's end may be names that nothing here has.
    for block in found.values():
        block.targets = [name for name in block.targets if name in found]
    return found


def _begin(found: dict[str, Block], before: Block, name: str) -> None:
    """Begin a block, which the one before it leads to unless it always goes elsewhere."""
    found[name] = Block()
    if not before.ends:
        before.targets.append(name)
