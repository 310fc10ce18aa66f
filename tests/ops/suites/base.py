# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One suite an operation; every backend inherits it and must pass the same.

``backend`` is what is asked for. The reference is also tried in float64; a kernel computes in
float32.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = [(1, 1), (3, 60), (2, 63), (5, 37), (1, 1000)]     # batch x outputs


def in_turn(*axes, part=2):
    """Their product; of it `make test` runs a ``part``-th in which every value comes up."""
    return [pytest.param(*case, marks=[] if sum(places) % part == 0 else pytest.mark.slow)
            for places, case in zip(itertools.product(*(range(len(a)) for a in axes)),
                                    itertools.product(*axes), strict=True)]


def draw(seed, *shape, scale=1., dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def spikes(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.3, dtype)


def parts(array):
    """A trailing axis of states as one array a state."""
    return tuple(array[..., s] for s in range(array.shape[-1]))


def rows(array):
    return tuple(parts(array[..., i, :]) for i in range(array.shape[-2]))


def close(got, want, tolerance):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (
            np.linalg.norm(a - b) / np.linalg.norm(b))
        assert a.size == 0 or np.abs(b).max() > 0           # equal because both are nothing?


@pytest.mark.usefixtures('compiled_quickly')
class Suite:
    """What every operation must do. A subclass names ``call``, ``operands`` and ``oracle``."""

    backend = 'jax'
    tolerance = 2e-6
    batch_axes = ()             # of each operand, where vmap may map an axis (all of them)

    def operands(self, S=2, dtype=jnp.float32):
        raise NotImplementedError

    def call(self, *operands, backend=None):
        raise NotImplementedError

    def run(self, *operands):
        return self.call(*operands, backend=self.backend)

    def test_jit_is_eager(self):
        operands = self.operands()
        close(jax.jit(self.run)(*operands), self.run(*operands), 1e-7)

    @pytest.mark.parametrize('mapped', ['all', 'each', 'all but one'])
    def test_vmap(self, mapped):
        """Every operand mapped, one alone, all but one: as one call an element."""
        lanes = 2
        many = [jnp.stack([a, -0.5 * a]) for a in self.operands()]
        count = len(many)
        choices = {'all': [tuple(range(count))], 'each': [(i,) for i in range(count)],
                   'all but one': list(itertools.combinations(range(count), count - 1))}[mapped]
        for chosen in choices:
            axes = tuple(0 if i in chosen else None for i in range(count))
            operands = [a if i in chosen else a[0] for i, a in enumerate(many)]
            got = jax.vmap(self.run, in_axes=axes)(*operands)
            one = [self.run(*[a[k] if i in chosen else a for i, a in enumerate(operands)])
                   for k in range(lanes)]
            close(got, jax.tree.map(lambda *a: jnp.stack(a), *one), 2e-6)

    def test_vmap_of_inner_axes(self):
        """The mapped axis may be any axis."""
        many = [jnp.stack([a, 0.5 * a, -a], axis=-1) for a in self.operands()]
        got = jax.vmap(self.run, in_axes=-1)(*many)
        one = [self.run(*[a[..., k] for a in many]) for k in range(3)]
        close(got, jax.tree.map(lambda *a: jnp.stack(a), *one), 2e-6)

    def test_nested_vmap(self):
        many = [jnp.stack([jnp.stack([a, -a]), jnp.stack([0.5 * a, 2 * a]),
                           jnp.stack([1.5 * a, 3 * a])]) for a in self.operands()]
        got = jax.vmap(jax.vmap(self.run))(*many)
        one = [[self.run(*[a[i, j] for a in many]) for j in range(2)] for i in range(3)]
        rows = [jax.tree.map(lambda *a: jnp.stack(a), *row) for row in one]
        close(got, jax.tree.map(lambda *a: jnp.stack(a), *rows), 2e-6)

    def test_vmap_is_one_call(self):
        """No loop: whatever is mapped, once or twice, the batched program holds the primitive
        once, and no while or map.
        """
        operands = self.operands()
        for inner in list(itertools.product((None, 0), repeat=len(operands)))[1:]:
            for axes in ((inner,), (inner, (*inner[1:], inner[0]))):
                mapped, many = self.run, list(operands)
                for each in axes:
                    mapped = jax.vmap(mapped, each)
                    many = [a if d is None else jnp.stack([a, a])
                            for a, d in zip(many, each, strict=True)]
                eqns = jax.make_jaxpr(mapped)(*many).jaxpr.eqns
                names = [eqn.primitive.name for eqn in eqns]
                assert sum(name.startswith('etp_') for name in names) == 1, axes
                assert not {'scan', 'while'} & set(names), axes

    def test_control_flow_and_remat(self):
        operands = self.operands()
        want = self.run(*operands)

        def scanned(first):
            return jax.lax.scan(lambda c, _: (c, self.run(c, *operands[1:])), first, None, 2)[1]
        close(jax.tree.map(lambda a: a[1], jax.jit(scanned)(operands[0])), want, 1e-7)
        close(jax.jit(lambda flag: jax.lax.cond(
            flag, lambda: self.run(*operands),
            lambda: jax.tree.map(jnp.zeros_like, want)))(True), want, 1e-7)
        close(jax.jit(jax.checkpoint(self.run))(*operands), want, 1e-7)
        start = jax.tree.map(jnp.zeros_like, want)
        looped = jax.jit(lambda: jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, self.run(*operands)), (0, start)))()
        close(looped[1], want, 1e-7)

    def test_gradient(self):
        """Through the reference, whatever the backend: as jax's own of the definition."""
        operands = self.operands()

        def loss(call):
            return lambda *a: sum((v ** 2).sum() for v in jax.tree.leaves(call(*a)))
        argnums = tuple(range(len(operands)))
        got = jax.grad(loss(self.run), argnums)(*operands)
        want = jax.grad(loss(self.definition), argnums)(*operands)
        close(got, want, 1e-5)

    def definition(self, *operands):
        """The reference, called outside of the primitive."""
        raise NotImplementedError
