"""Where wgmma's descriptors of shared memory come from, in machine code.

They stand in uniform registers, which ptxas 12.9 has shared between two branches of a loop: one
branch multiplied what the other had pointed at, a turn or more ago. Here a descriptor that a loop
computes must have been computed since the loop's turn began, on every way to its use.
"""

from __future__ import annotations

import re

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# no results in uniform registers, though their first operands may be such
_NO_RESULT = ("UISETP", "UPLOP3", "UTMA", "UBLKCP")
_REGISTERS = 64


def stale_descriptors(text: str) -> list[str]:
    """Multiplications in `cuobjdump -sass` text whose descriptor may be that of another turn."""
    code = [(int(at, 16), op.strip()) for at, op in _LINE.findall(text)]
    after = _successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, targets in enumerate(after):
        for j in targets:
            before[j].append(i)
    results = [_results(op) for _, op in code]
    found = []
    for head, body in _loops(after, before).items():
        uses = [i for i in body if "HGMMA" in code[i][1]]
        computed = set().union(*(results[i] for i in body))
        fresh = _computed_since(head, body, before, results) if uses else {}
        for i in uses:
            match = re.search(r"gdesc\[UR(\d+)\]", code[i][1])
            assert match is not None, code[i]
            # of four registers, those of the operand in shared memory
            first = int(match[1]) + 2
            if {first, first + 1} & computed - fresh[i]:
                found.append(f"{code[i][0]:#x} {code[i][1]}")
    return found


def _successors(code: list[tuple[int, str]]) -> list[list[int]]:
    index = {at: i for i, (at, _) in enumerate(code)}
    after = []
    for i, (_, op) in enumerate(code):
        body = _PREDICATE.sub("", op)
        may_fall = body != op or not body.startswith(("BRA", "EXIT"))
        targets = []
        if body.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)", body)
            assert target is not None, op
            targets.append(index[int(target[1], 16)])
            # with a predicate as an operand, or for threads that diverge
            may_fall |= re.match(r"BRA(\.\w+)*\s+!?U?P\d|BRA\.DIV", body) is not None
        if may_fall and i + 1 < len(code):
            targets.append(i + 1)
        after.append(targets)
    return after


def _results(op: str) -> set[int]:
    """Numbers of the uniform registers that an instruction writes."""
    name, _, operands = _PREDICATE.sub("", op).partition(" ")
    if not re.match(r"U|R2UR|S2UR|VOTEU", name) or name.startswith(_NO_RESULT):
        return set()
    result = re.match(r"(?:U?P[0-6T],\s*)?UR(\d+)\b", operands.strip())
    if result is None:
        return set()
    count = 4 if ".128" in name else 2 if re.search(r"\.64|\.WIDE", name) else 1
    return set(range(int(result[1]), int(result[1]) + count))


def _loops(after: list[list[int]], before: list[list[int]]) -> dict[int, set[int]]:
    """Instructions of each loop, by that of its head."""
    loops: dict[int, set[int]] = {}
    for i, targets in enumerate(after):
        for head in targets:
            # and not only back to where one went past the end to wait
            if head > i or i in _reached(after, without=head):
                continue
            body, todo = {head, i}, [i] if i != head else []
            while todo:
                for j in before[todo.pop()]:
                    if j not in body:
                        body.add(j)
                        todo.append(j)
            loops.setdefault(head, set()).update(body)
    return loops


def _reached(after: list[list[int]], without: int) -> set[int]:
    """Instructions that the first one leads to, other than through one of them."""
    reached, todo = {without}, [0]
    while todo:
        i = todo.pop()
        if i not in reached:
            reached.add(i)
            todo += after[i]
    return reached - {without}


def _computed_since(
    head: int, body: set[int], before: list[list[int]], results: list[set[int]]
) -> dict[int, set[int]]:
    """What all ways from the head to an instruction have written, ahead of it."""
    everything = set(range(_REGISTERS))
    ahead = {i: everything for i in body} | {head: set()}
    changed = True
    while changed:
        changed = False
        for i in sorted(body - {head}):
            ways = [ahead[j] | results[j] for j in before[i] if j in body]
            now = set.intersection(*ways)
            changed |= now != ahead[i]
            ahead[i] = now
    return ahead
