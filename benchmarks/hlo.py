# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a program compiled by XLA launches on a GPU, read from its text.

Loops count as often as they run. A kernel is charged for what it touches: a slice that it reads
of a large array, the update that it writes into one in place. Its time is XLA's own model where
XLA gives one, else its bytes at full bandwidth: so a custom call counts its operands and results.
A product of ours says how many operations it does, and counts those at the peak of the units that
do them where that takes longer.
A model is no timing: it compares programs that were compiled together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

__all__ = ['Kernel', 'Totals', 'exchanges', 'kernels', 'total']

#: What launches nothing.
_FREE = frozenset({'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota',
                   'partition-id', 'replica-id', 'after-all', 'opt-barrier'})
#: What reads of its first operand as much as it returns.
_WINDOWS = frozenset({'dynamic-slice', 'slice', 'gather'})
#: What writes its update alone where it may work in place: the position of the update.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}

#: What devices send to each other; ``-start`` follows where it does not wait.
_EXCHANGES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-', 'ragged-all-to-all',
              'reduce-scatter')

_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$')
_LINE = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*?)\)'
                   r'(, .*)?$')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A launch of the program.

    Attributes
    ----------
    name, operation : str
        Of its instruction.
    times : int
        Launches in one run of the program.
    read, written : int
        Bytes that one launch touches.
    microseconds : float
        Of one launch.
    basis : str
        Where the time is from: ``'model'`` (XLA gave it), ``'bytes'`` (at full bandwidth) or
        ``'operations'`` (at the peak of the units that do them).
    source : str
        What it was in the user's program.
    """

    name: str
    operation: str
    times: int
    read: int
    written: int
    microseconds: float
    basis: str
    source: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Of one run of a program; ``unknown_loops``: loops of unknown length, counted once."""

    launches: int
    bytes: int
    microseconds: float
    unknown_loops: int = 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, *words: str) -> list[str]:
        """Computations named by these attributes."""
        found = re.findall(rf'\b(?:{"|".join(words)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))', self.rest)
        return [name.strip().lstrip('%') for many, one in found
                for name in (many or one).split(',')]

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


_Body = dict[str, _Instruction]


@dataclasses.dataclass(frozen=True)
class _Device:
    bandwidth: float
    peaks: Mapping[str, float]

    def time(self, touched: int, source: str) -> tuple[float, str]:
        """Microseconds of a kernel without a model, and what they are due to."""
        times = {'bytes': touched / self.bandwidth * 1e6}
        said = re.search(r'/(\w+?)_operations_(\d+)', source)
        if said and said[1] in self.peaks:
            times['operations'] = int(said[2]) / self.peaks[said[1]] * 1e6
        basis = max(times, key=lambda b: times[b])
        return times[basis], basis


def kernels(text: str, bandwidth: float,
            peaks: Mapping[str, float] | None = None) -> list[Kernel]:
    """Every launch of a program.

    Parameters
    ----------
    text : str
        ``compiled.as_text()``.
    bandwidth : float
        Of the device's memory, in bytes a second.
    peaks : mapping of str to float, optional
        Operations a second of the device, by what they are done in (``'tf32'``).
    """
    bodies, entry = _computations(text)
    return list(_visit(bodies, entry, 1, _Device(bandwidth, peaks or {})))


def exchanges(launched: Sequence[Kernel]) -> list[Kernel]:
    """Those in which devices send to each other."""
    return [k for k in launched if k.operation.startswith(_EXCHANGES)]


def total(launched: Sequence[Kernel], text: str = '') -> Totals:
    """The sum over a program's launches."""
    return Totals(sum(k.times for k in launched),
                  sum(k.times * (k.read + k.written) for k in launched),
                  sum(k.times * k.microseconds for k in launched),
                  len([line for line in text.splitlines()
                       if ' while(' in line and _trips(line) is None]))


def _computations(text: str) -> tuple[dict[str, _Body], str]:
    bodies: dict[str, _Body] = {}
    entry, body = '', None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            body = bodies.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith('}'):
            body = None
        elif body is not None and (found := _LINE.match(line)):
            root, name, shape, op, operands, rest = found.groups()
            body[name] = _Instruction(name, shape, op, tuple(re.findall(r'%([\w.\-]+)', operands)),
                                      rest or '', bool(root))
    if not entry:
        raise ValueError('this is not the text of a compiled program: it has no ENTRY')
    return bodies, entry


def _trips(text: str) -> int | None:
    found = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', text)
    return int(found[1]) if found else None


def _visit(bodies: Mapping[str, _Body], name: str, times: int,
           device: _Device) -> Iterator[Kernel]:
    body = bodies[name]
    for i in body.values():
        if i.op == 'while':
            trips = _trips(i.rest)
            # a loop of known length is not asked whether it goes on
            for inner in i.called('body') + ([] if trips else i.called('condition')):
                yield from _visit(bodies, inner, times * (trips or 1), device)
        elif i.op == 'conditional':
            branches = [list(_visit(bodies, b, times, device)) for b in i.called(
                'branch_computations', 'true_computation', 'false_computation')]
            yield from max(branches, key=lambda b: total(b).microseconds)
        elif i.op in ('call', 'async-start'):
            for inner in i.called('to_apply', 'calls'):
                yield from _visit(bodies, inner, times, device)
        elif i.op not in _FREE and not i.op.endswith(('-done', '-update')):
            yield _kernel(bodies, body, i, times, device)


def _kernel(bodies: Mapping[str, _Body], body: _Body, i: _Instruction, times: int,
            device: _Device) -> Kernel:
    called = i.called('calls') if i.op in ('fusion', 'fusion-start') else []
    read, written = _traffic_of_fusion(bodies[called[0]]) if called else _traffic(body, i)
    modelled = i.attribute(r'"exec_time_us":([\d.eE+\-]+)')
    target = i.attribute(r'custom_call_target="([^"]+)"')
    source = i.attribute(r'op_name="([^"]+)"') or ''
    time, basis = (float(modelled), 'model') if modelled else device.time(read + written, source)
    return Kernel(i.name, target or i.op, times, read, written, time, basis, source)


def _bytes(shape: str) -> int:
    """Of a shape, or of all in a tuple."""
    total = 0
    for dtype, sizes in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', shape):
        digits = re.search(r'\d+', dtype)           # f32, bf16, f8e4m3fn; pred, token have none
        bits = int(digits[0]) if digits else 8 * (dtype == 'pred')
        total += -(-math.prod(map(int, filter(None, sizes.split(',')))) * bits // 8)
    return total


def _elements(shape: str) -> list[str]:
    """The arrays of a tuple, nested ones too."""
    return re.findall(r'\b[a-z]\w*\[[\d,]*\]', shape)


def _traffic(body: _Body, i: _Instruction) -> tuple[int, int]:
    """Bytes that an instruction reads and writes as a kernel of its own."""
    size = lambda name: _bytes(body[name].shape) if name in body else 0  # noqa: E731
    if i.op in _WINDOWS:
        return _bytes(i.shape), _bytes(i.shape)
    if i.op in _UPDATES:
        update = size(i.operands[_UPDATES[i.op]])
        return update, update
    read = sum(map(size, i.operands))
    result = i.shape
    if i.op.endswith('-start'):             # its shape has the operands, and a context, too
        arrays = _elements(i.shape)
        result = arrays[0] if i.op == 'copy-start' or len(arrays) == 1 else arrays[1]
    elif (i.attribute(r'custom_call_target="([^"]+)"') or '').startswith('__cublas'):
        result = _elements(i.shape)[0]      # what follows is the workspace
    return read, _bytes(result)


def _traffic_of_fusion(body: _Body) -> tuple[int, int]:
    """The same of a fusion: a parameter is read as far as it is used."""
    users: dict[str, list[tuple[_Instruction, int]]] = {}
    for i in body.values():
        for position, name in enumerate(i.operands):
            users.setdefault(name, []).append((i, position))

    def read(name: str) -> int:
        found = 0
        for user, position in users.get(name, []):
            if user.op == 'bitcast':
                part = read(user.name)
            elif position == 0 and user.op in _WINDOWS:
                part = _bytes(user.shape)
            elif position == 0 and user.op in _UPDATES:
                part = 0
            else:
                return _bytes(body[name].shape)
            found += part
        return min(found, _bytes(body[name].shape))

    def origin(name: str) -> _Instruction:
        i = body[name]
        return origin(i.operands[0]) if i.op == 'bitcast' else i

    def written(name: str) -> int:
        i = origin(name)
        if i.op in _UPDATES and origin(i.operands[0]).op == 'parameter':
            return _bytes(body[i.operands[_UPDATES[i.op]]].shape)
        return _bytes(i.shape)

    root = next(i for i in body.values() if i.root)
    results = root.operands if root.op == 'tuple' else (root.name,)
    return (sum(read(i.name) for i in body.values() if i.op == 'parameter'),
            sum(map(written, results)))
