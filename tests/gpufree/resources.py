# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost on a device, read from the machine code that Triton makes for it.

``python -m tests.gpufree.resources`` writes the table that the tests compare with,
``kernels/RESOURCES.md``.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp

from tests.ops.steps import STEPS, I
from traceops.kernels.adjoint_window.launch import is_separate
from traceops.kernels.launch import GENERATIONS, kernel_function
from traceops.kernels.simulate_window.step import trace_step
from traceops.ops import PRECISIONS
from traceops.ops.primitive import OPERATIONS

TABLE = pathlib.Path(__file__).parents[2] / 'kernels/RESOURCES.md'

#: Of a multiprocessor, by compute capability: shared memory, and the most that a block may ask
#: for. Registers and threads are the same for all.
SHARED = {80: (167936, 166912), 90: (233472, 232448), 100: (233472, 232448)}
REGISTERS, THREADS = 65536, 2048
_TYPES = {'float32': '*fp32', 'bfloat16': '*bf16', 'float16': '*fp16', 'int32': '*i32'}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel in one of its forms, for one generation."""

    generation: int
    operation: str
    form: str                   # what tells it from others of the operation
    shapes: tuple
    params: tuple

    @property
    def name(self):
        return f'{GENERATIONS[self.generation]} {self.operation} {self.form}'

    def call(self):
        """The launch that the table gives."""
        structs = [jax.ShapeDtypeStruct(s, d) for s, d in self.shapes]
        found = OPERATIONS[self.operation].kernel(*structs, capability=self.generation,
                                                  **dict(self.params))
        assert not isinstance(found, str), found
        return structs, found


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of the machine code: all figures that may not grow, but ``wide``, which may not shrink."""

    registers: int
    shared: int
    stack: int
    local: int                  # loads and stores of spilled registers
    wide: int                   # global loads and stores of 128 bits
    narrow: int                 # and of less
    instructions: int
    tensor: int                 # products on tensor cores


_PLACE = (32, 512)


def _scan_cases():
    for g, S in itertools.product(GENERATIONS, (1, 2, 3, 4)):
        for R, kappa in ((1, None), (1, .5), (4, .5)):
            vector, matrix = ((50, *_PLACE, S), jnp.float32), ((50, *_PLACE, S, S), jnp.float32)
            yield Case(g, 'adjoint_window', f'S={S} relations={R} filter={kappa is not None}',
                       (vector, matrix, *(vector,) * R),
                       (('kappa', kappa), ('states', 0), ('leaving', '')))
        yield Case(g, 'es_trace_window', f'S={S}',
                   (vector, matrix, vector, ((*_PLACE, S), jnp.float32), ((50,), jnp.float32)),
                   (('decay_x', .9), ('decay_f', .9), ('states', 0)))
        if S > 1:
            one, last = ((50, *_PLACE), jnp.float32), (_PLACE, jnp.float32)
            yield Case(g, 'es_trace_window', f'S={S} separate',
                       (*(one,) * (S + S * S + S), *(last,) * S, ((50,), jnp.float32)),
                       (('decay_x', .9), ('decay_f', .9), ('states', S)))


def _scan_forms():
    """The scan with one operand a state, and its other form."""
    for g, S in itertools.product(GENERATIONS, (1, 2, 3, 4)):
        one = ((50, *_PLACE), jnp.float32)
        vector, matrix = ((50, *_PLACE, S), jnp.float32), ((50, *_PLACE, S, S), jnp.float32)
        for R in (1, 4):
            separate = is_separate(S, R)
            for kappa in (None, .5) if separate else ():
                yield Case(g, 'adjoint_window',
                           f'S={S} relations={R} filter={kappa is not None} separate',
                           (one,) * (S + S * S + R * S),
                           (('kappa', kappa), ('states', S), ('leaving', '')))
            yield Case(g, 'adjoint_window', f'S={S} relations={R} leaving{" separate" * separate}',
                       (one,) * (S * S + R * S) if separate else (matrix, *(vector,) * R),
                       (('kappa', .5), ('states', S * separate), ('leaving', 'onto')))


def _trace_cases():
    """One by one and multiplied; all forms of up to four states, of more those that differ."""
    B, I, O = 32, 1024, 1024  # noqa: E741
    narrow = jnp.bfloat16, jnp.float16
    for g, S, T in itertools.product(GENERATIONS, range(1, 9), (4, 50)):
        forms = [(jnp.float32, 'entering'), (jnp.bfloat16, 'entering')]
        if S <= 4:
            forms = [*((jnp.float32, gradient) for gradient in ('entering', 'leaving', 'none')),
                     *((dtype, 'entering') for dtype in narrow)]
        for dtype, gradient in forms:
            yield Case(g, 'd_trace_window',
                       f'S={S} {jnp.dtype(dtype).name} gradient={gradient}{" many" * (T > 8)}',
                       (((B, I, O, S), dtype), ((T, B, I), jnp.float32),
                        ((T, B, O, S), jnp.float32), ((B, O, S, S), jnp.float32),
                        ((B, O, S), jnp.float32)), (('gradient', gradient),))


def _product_cases():
    T, B = 50, 32
    for g, precision, (size, n) in itertools.product(GENERATIONS, PRECISIONS, (
            ('many', 2048), ('few', 512), ('shared', 256))):
        operands = (((T, B, n), jnp.float32),) * 2
        for onto in (False, True) if size != 'shared' else (False,):
            yield Case(g, 'trace_gradient', f'{precision} {size}{" onto" * onto}',
                       operands + (((n, n), jnp.float32),) * onto,
                       (('precision', precision), ('by_sample', False)))
    for g, precision, (size, n) in itertools.product(GENERATIONS, PRECISIONS, (
            ('many', 1024), ('few', 128))):
        yield Case(g, 'trace_gradient', f'{precision} {size} by sample',
                   (((T, B, n), jnp.float32),) * 2,
                   (('precision', precision), ('by_sample', True)))


def _sparse_cases():
    for g, by_sample in itertools.product(GENERATIONS, (False, True)):
        yield Case(g, 'sparse_trace_gradient', 'by sample' if by_sample else 'whole batch',
                   (*(((50, 32, 1024), jnp.float32),) * 2, *(((10 ** 5,), jnp.int32),) * 2),
                   (('by_sample', by_sample),))


def _simulation_cases():
    """Of the steps that the tests of the operation have, at the sizes that are trained."""
    T, B = 50, 32
    for g, (net, N) in itertools.product(GENERATIONS, (
            ('lif', 128), ('lif', 1024), ('lif', 2048), ('alif', 1024), ('gru', 128))):
        function, count, _ = STEPS[net]
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        step, operands = trace_step(
            function, [struct((I + N, N)), struct((N,)), struct((N,))], [struct((T, B, I))],
            [struct((B, N))] * count, 1, '')
        yield Case(g, 'simulate_window', f'{net} {N}',
                   tuple((a.shape, a.dtype) for a in operands), (('step', step),))


CASES = [*_scan_cases(), *_scan_forms(), *_trace_cases(), *_product_cases(), *_sparse_cases(),
         *_simulation_cases()]


def compile_case(case):
    """The compiled kernel, for a device that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    structs, call = case.call()
    if call.prepare is not None:
        structs = jax.eval_shape(call.prepare, structs)
    kernel = kernel_function(call.kernel)
    pointers = [_TYPES[jnp.dtype(a.dtype).name] for a in structs]
    outputs = [_TYPES[jnp.dtype(d).name] for i, (_, d) in enumerate(call.outputs)
               if i not in call.aliases.values()]
    types = [*pointers, *['i32'] * len(call.scalars), *outputs]
    signature = dict(zip(kernel.arg_names, [*types, *['constexpr'] * len(call.constants)],
                         strict=True))
    aligned = {(i,): [['tt.divisibility', 16]] for i, t in enumerate(types) if t[0] == '*'}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=dict(call.constants), attrs=aligned),
        target=GPUTarget('cuda', case.generation, 32),
        options={'num_warps': call.tile.warps, 'num_stages': call.tile.stages,
                 'enable_fp_fusion': True})


_INSTRUCTION = re.compile(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)')


def innermost_loops(compiled):
    """Instructions of every loop that has none inside, in the machine code of a kernel."""
    return [inner for _, inside in nested_loops(compiled) for _, inner in inside]


def nested_loops(compiled):
    """``(instructions, [(place, instructions of a loop inside)])`` of the outermost loops."""
    lines = _disassemble(compiled.asm['cubin'])[1].splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r'(\.L\w+):', line))}
    back = [(labels[m[1]], i) for i, line in enumerate(lines)
            if (m := re.search(r'\bBRA\b.*`\((\.L\w+)\)', line)) and labels[m[1]] < i]
    is_inside = lambda x, y: y[0] <= x[0] and x[1] < y[1]  # noqa: E731
    of = lambda a, b: _INSTRUCTION.findall('\n'.join(lines[a:b]))  # noqa: E731
    innermost = [x for x in back if not any(is_inside(y, x) for y in back)]
    outermost = [x for x in back if not any(is_inside(x, y) for y in back)]
    return [(of(a, b + 1), [(len(of(a, c)), of(c, d + 1)) for c, d in innermost if a <= c <= b])
            for a, b in outermost]


def measure(case):
    """Figures of a case."""
    return measured(compile_case(case))


def measured(compiled):
    """Figures of a compiled kernel."""
    usage, code = _disassemble(compiled.asm['cubin'])
    figure = lambda word: int(re.search(rf'{word}:(\d+)', usage)[1])  # noqa: E731
    instructions = _INSTRUCTION.findall(code)
    kinds = collections.Counter(instructions)
    touching = lambda *heads: {k: n for k, n in kinds.items()  # noqa: E731
                               if k.split('.')[0] in heads}
    memory = touching('LDG', 'STG', 'LDGSTS')
    wide = sum(n for k, n in memory.items() if '128' in k.split('.'))
    return Resources(figure('REG'), compiled.metadata.shared, figure('STACK'),
                     sum(touching('LDL', 'STL').values()), wide, sum(memory.values()) - wide,
                     len(instructions), sum(touching('HMMA', 'HGMMA', 'UTCHMMA').values()))


def _disassemble(cubin):
    import triton
    tools = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        run = lambda *a: subprocess.run([*a, file.name], capture_output=True, text=True,  # noqa: E731
                                        check=True).stdout
        return (run(tools / 'cuobjdump', '--dump-resource-usage'), run(tools / 'nvdisasm', '-c'))


def blocks_per_sm(resources, warps, generation):
    """Programs that fit on a multiprocessor at once."""
    registers = -(-resources.registers * 32 // 256) * 256 * warps      # given out by 256 a warp
    shared = resources.shared + 1024                                   # the driver's own
    return min(REGISTERS // registers, THREADS // (32 * warps), 32,
               SHARED[generation][0] // shared)


def read_table():
    """Name to recorded figures."""
    rows = {}
    for line in TABLE.read_text(encoding='utf-8').splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if len(cells) == 10 and cells[0].startswith('sm_'):
            rows[cells[0]] = Resources(*map(int, cells[1:9]))
    return rows


def write_table(rows):
    """Of ``{case: resources}``."""
    head = [field.name for field in dataclasses.fields(Resources)]
    lines = ['# What the kernels use', '',
             'Read from the machine code (triton 3.9.0) of every kernel and entry of the launch',
             'tables; `python -m tests.gpufree.resources` writes this file, `make test-gpufree`',
             'fails where a figure has got worse. `local`: accesses of spilled registers; `wide`,',
             '`narrow`: accesses of global memory of 128 bits and of less; `tensor`: products on',
             'tensor cores; `blocks`: programs that fit on a multiprocessor at once, of which the',
             'launch table claims the second number.',
             '', '| kernel | ' + ' | '.join(head) + ' | blocks |', '|---' * 10 + '|']
    for case, r in rows.items():
        tile = case.call()[1].tile
        fit = blocks_per_sm(r, tile.warps, case.generation)
        lines.append(f'| {case.name} | ' + ' | '.join(map(str, dataclasses.astuple(r)))
                     + f' | {fit}, {tile.blocks_per_sm} |')
    TABLE.write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    write_table({case: measure(case) for case in CASES})
