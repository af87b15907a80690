"""Compiles a Triton kernel for a GPU that need not be present, and counts the instructions of its loops in SASS, NVIDIA's machine code."""

from __future__ import annotations

import collections
import functools
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)(.*)")
_TARGET = re.compile(r"(\.L_[\w.]+)")
_MATRIX = ("HMMA", "HGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "QGMMA")
# The assembler also jumps by a call that never returns.
_JUMPS = ("BRA", "@BRA", "CALL.REL", "@CALL.REL")
_ENDS = (*_JUMPS, "EXIT", "RET", "BRX", "@EXIT")
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. What is counted in its code takes as long as to compile it, and is found when it is asked for.

    Attributes:
        registers: a thread.
        stack: bytes a thread; zero if nothing spills.
        shared: bytes a block.
        cubin: the file.
    """

    registers: int
    stack: int
    shared: int
    cubin: bytes

    @functools.cached_property
    def _disassembly(self) -> tuple[list[tuple[str, str]], dict[str, int]]:
        return _disassemble(_tool("nvdisasm", self.cubin, "-c"))

    @functools.cached_property
    def code(self) -> collections.Counter[str]:
        """Opcodes of the whole kernel."""
        return collections.Counter(op.lstrip("@") for op, _ in self._disassembly[0])

    @property
    def local(self) -> int:
        """Loads and stores of local memory, that is, spills."""
        return sum(n for op, n in self.code.items() if op.startswith(_LOCAL))

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Opcodes of the loops at the outermost level, in program order, each with the opcodes of the loops nested in it."""
        return _loops(*self._disassembly)


@dataclass(frozen=True)
class Loop:
    body: collections.Counter[str]  # without nested loops; a loop that waits for a barrier counts as one turn of the body
    nested: collections.Counter[str]  # loops over features

    def weighed(self, trips: int) -> collections.Counter[str]:
        """Instructions of one turn, in which each nested loop takes `trips` turns."""
        return self.body + collections.Counter({op: n * trips for op, n in self.nested.items()})


def compile_kernel(fn: Any, types: dict[str, Any], constants: dict[str, Any], arch: int, aligned: tuple[str, ...] = ()) -> Binary:
    """Compile for compute capability arch / 10.

    Args:
        types: of each argument that is no constexpr, as Triton writes them: "*fp32", "i32", or a tuple of such. Pointers are aligned to
            16 bytes, those in tuples too. None stands for an argument or a field that is None.
        constants: the constexprs, num_warps, num_stages and maxnreg.
        aligned: integer arguments that are multiples of 16.
    """
    binary = compile_for(GPUTarget("cuda", arch, 32), fn, types, constants, aligned)
    usage = _tool("cuobjdump", binary.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Binary(int(found[1]), int(found[2]), binary.metadata.shared, binary.asm["cubin"])


def compile_for(target: GPUTarget, fn: Any, types: dict[str, Any], constants: dict[str, Any], aligned: tuple[str, ...] = ()) -> Any:
    """Triton's binary; arguments as of `compile_kernel`."""
    options = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature = {name: _none_as_constexpr(types.get(name, "constexpr")) for name in fn.arg_names}
    absent = {path: None for path, kind in _leaves([types.get(name, "constexpr") for name in fn.arg_names]) if kind is None}
    missing = [name for name in fn.arg_names if name not in types and name not in constants]
    if missing:
        raise ValueError(f"{fn.__name__} must have a type or a value for each argument, got none for {', '.join(missing)}")
    aligned_types = [kind if name not in aligned else f"*{kind}" for name, kind in signature.items()]
    attrs = {path: [["tt.divisibility", 16]] for path, kind in _leaves(aligned_types) if kind.startswith("*")}
    constexprs = {name: value for name, value in constants.items() if name in fn.arg_names} | absent
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def argument_types(fn: Any, pick: Callable[[str], Any]) -> dict[str, Any]:
    """`pick(name)` for each argument of `fn` that is no constexpr, or for each field of one that is annotated as a NamedTuple."""
    types = {}
    for name, parameter in inspect.signature(fn.fn).parameters.items():
        fields = fn.fn.__globals__.get(parameter.annotation)
        if fields is not None:
            types[name] = fields(*map(pick, fields._fields))
        elif parameter.annotation != "tl.constexpr":
            types[name] = pick(name)
    return types


def _leaves(types: Sequence[Any], path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str | None]]:
    """Each type with its place, also within tuples."""
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _leaves(kind, (*path, i))
        else:
            yield (*path, i), kind


def _none_as_constexpr(kind: Any) -> Any:
    if not isinstance(kind, tuple):
        return "constexpr" if kind is None else kind
    kinds = map(_none_as_constexpr, kind)
    return type(kind)(*kinds) if hasattr(kind, "_fields") else tuple(kinds)


def is_matrix(op: str) -> bool:
    return op.startswith(_MATRIX)


def is_product(op: str) -> bool:
    return is_matrix(op) or op.startswith(("FFMA", "DFMA", "MUFU"))


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([os.path.join(_BIN, name), *options, file.name], capture_output=True, text=True, check=True).stdout


def _disassemble(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(("@" * bool(instruction[1]) + instruction[2], instruction[3]))
    return code, labels


def _loops(code: list[tuple[str, str]], labels: dict[str, int]) -> list[Loop]:
    """Finds loops in the graph of branches: their spans in the listing overlap, as code that waits for a barrier is out of line."""
    starts = sorted({0, *labels.values(), *(i + 1 for i, (op, _) in enumerate(code) if op.startswith(_ENDS))} - {len(code)})
    ends = [*starts[1:], len(code)]
    block_at = {start: n for n, start in enumerate(starts)}
    successors: list[list[int]] = []
    for n, end in enumerate(ends):
        op, rest = code[end - 1]
        # A conditional branch has a predicate, or a uniform predicate as an operand.
        conditional = op.startswith("@") or (op.startswith(_JUMPS) and not rest.strip().startswith("`"))
        following = []
        target = _TARGET.search(rest)
        if op.startswith(_JUMPS) and target and labels.get(target[1], len(code)) < len(code):
            following.append(block_at[labels[target[1]]])
        if n + 1 < len(ends) and (conditional or not op.startswith(_ENDS)):
            following.append(n + 1)
        successors.append(following)
    predecessors: list[list[int]] = [[] for _ in starts]
    for n, following in enumerate(successors):
        for m in following:
            predecessors[m].append(n)

    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for n, following in enumerate(successors):
        for header in following:
            if header in dominators.get(n, ()):
                bodies.setdefault(header, {header}).update(_reaching(n, header, predecessors))

    def count(blocks: set[int]) -> collections.Counter[str]:
        return collections.Counter(code[i][0].lstrip("@") for n in blocks for i in range(starts[n], ends[n]))

    loops = []
    for _, body in sorted(bodies.items()):
        if any(body < other for other in bodies.values()):
            continue
        steps = set().union(*(other for other in bodies.values() if other < body and any(is_product(op) for op in count(other))), set())
        loops.append(Loop(count(body - steps), count(steps)))
    return loops


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    reached, stack = {0}, [0]
    while stack:
        for m in successors[stack.pop()]:
            if m not in reached:
                reached.add(m)
                stack.append(m)
    dominators = {n: {0} if n == 0 else set(reached) for n in reached}
    changed = True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            new = {n} | set.intersection(*(dominators[p] for p in predecessors[n] if p in reached))
            if new != dominators[n]:
                dominators[n], changed = new, True
    return dominators


def _reaching(n: int, header: int, predecessors: list[list[int]]) -> set[int]:
    """Blocks from which n is reached without passing the header."""
    body, stack = {header}, [n]
    while stack:
        m = stack.pop()
        if m not in body:
            body.add(m)
            stack.extend(predecessors[m])
    return body
