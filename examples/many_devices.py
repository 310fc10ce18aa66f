# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The same training step on one device, on eight, and on two processes that share the eight.

The engine is jax's own: where inputs, states and weights lie decides what each device does. This
script trains a small spiking network (ES-D-RTRL) and shows, of the programs that it compiled:

* samples spread over the devices: the gradients of one device, one reduction a window, nothing
  gathered, and the same work for each device however many there are;
* neurons and their weights spread over the devices: each device forms the gradient of its own
  weights; what is exchanged are the spikes, no weight and no gradient of a large weight;
* two processes joined by ``jax.distributed``: the same curve. Both write checkpoints (orbax); one
  of them is killed in the middle, both are started again, and the curve is still the same.

The devices are made of this machine's processor, so they show what is exchanged, and no speed.

    python examples/many_devices.py
    python examples/many_devices.py --neurons 512 --batch 128 --training-steps 40
"""

import argparse
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

DEVICES, PROCESSES = 8, 2


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--neurons', type=int, default=128)
    parser.add_argument('--batch', type=int, default=32, help='samples, of all devices together')
    parser.add_argument('--steps', type=int, default=60, help='of a sample')
    parser.add_argument('--window', type=int, default=20, help='steps')
    parser.add_argument('--training-steps', type=int, default=12)
    parser.add_argument('--rate', type=float, default=1e-2, help='of Adam')
    parser.add_argument('--seed', type=int, default=0)
    process = parser.add_argument_group('of one process of several, started by the script itself')
    process.add_argument('--process', type=int, help='its number')
    process.add_argument('--coordinator', help='address of process 0')
    process.add_argument('--checkpoints', type=pathlib.Path)
    process.add_argument('--die-after', type=int, help='training steps')
    return parser.parse_args(argv)


def devices(count):
    """Make ``count`` devices of this processor; jax decides when it starts."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                               + f' --xla_force_host_platform_device_count={count}')


# ---------------------------------------------------------------------------------------------
# The task: which of four patterns of input rates is shown

LINES, CLASSES = 40, 4


def samples(args, step, batch=None):
    """Spikes ``[T, batch, 40]`` and classes ``[batch]``, the same in every process."""
    import numpy as np
    rates = np.random.default_rng(args.seed).choice([0.05, 0.3], size=(CLASSES, LINES))
    rng = np.random.default_rng((args.seed, step))
    classes = rng.integers(CLASSES, size=batch or args.batch)
    spikes = rng.random((args.steps, len(classes), LINES)) < rates[classes]
    return spikes.astype(np.float32), classes.astype(np.int32)


# ---------------------------------------------------------------------------------------------
# The network, and one training step: as on one device

def make_trainer(args, batch=None):
    """``train_step(spikes, classes) -> (loss, gradients)``, its learner and its states."""
    import brainpy
    import brainstate
    import braintools
    import braintrace
    import jax.numpy as jnp
    import saiunit as u

    brainstate.environ.set(dt=1. * u.ms)
    brainstate.random.seed(args.seed)
    batch = batch or args.batch

    class Net(brainstate.nn.Module):
        """Input spikes -> recurrent LIF neurons -> leaky rates."""

        def __init__(self):
            super().__init__()
            n = args.neurons
            self.feedforward = braintrace.nn.Linear(
                LINES, n, w_init=braintools.init.Normal(0. * u.mA, 0.5 * u.mA),
                b_init=braintools.init.ZeroInit(unit=u.mA))
            self.recurrent = braintrace.nn.Linear(
                n, n, w_init=braintools.init.Normal(0. * u.mA, 0.5 * n ** -0.5 * u.mA),
                b_init=None)
            self.neuron = brainpy.state.LIF(
                n, R=20. * u.ohm, tau=20. * u.ms, V_th=1. * u.mV, V_reset=0. * u.mV,
                V_rest=0. * u.mV, spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
            self.readout = braintrace.nn.LeakyRateReadout(n, CLASSES, tau=20. * u.ms)

        def update(self, x):
            current = self.feedforward(x) + self.recurrent(self.neuron.get_spike())
            return self.readout(self.neuron(current))

    learner = braintrace.compile(Net(), 'ES_D_RTRL', jnp.zeros((batch, LINES)), batch_size=batch,
                                 decay_or_rank=0.95)
    optimizer = braintools.optim.Adam(args.rate)
    optimizer.register_trainable_weights(learner.param_states)

    @brainstate.transform.jit
    def train_step(spikes, classes):
        brainstate.nn.reset_all_states(learner, batch_size=batch)

        def loss_of_a_step(x):
            logits = learner(x)
            loss = braintools.metric.softmax_cross_entropy_with_integer_labels(logits, classes)
            return loss.mean()

        grads, losses = learner.etrace_grad(spikes, step_fn=loss_of_a_step, return_value=True)
        optimizer.update(grads)
        return losses.mean(), grads

    kept = [*learner.param_states.values(),
            *(v for v in vars(optimizer).values() if isinstance(v, brainstate.State))]
    return train_step, learner, kept


# ---------------------------------------------------------------------------------------------
# Where arrays lie. This is all that there is to add.

def put(value, mesh, *axes):
    """An array of every process as one array of all of them, spread over ``axes``."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda index: value[index])


def spread(learner, kept, mesh, by, batch, neurons):
    """Put the states of a learner, and what is ``kept`` between steps, on the devices.

    By samples: what has a sample axis is cut along it, weights are on every device. By neurons:
    what has an axis of neurons is cut along that.
    """
    import brainstate
    import jax
    import numpy as np

    def axes(shape, of_samples):
        if by == 'samples':
            return ('devices',) if of_samples and shape[:1] == (batch,) else ()
        # of the axes of neurons the last: a weight is cut by the neurons that it leads to
        found = [i for i, n in enumerate(shape) if n == neurons and i >= of_samples]
        return (*[None] * found[-1], 'devices') if found else ()

    for state in [*kept, *brainstate.graph.states(learner).values()]:
        of_samples = all(state is not k for k in kept)
        state.value = jax.tree.map(
            lambda a, of_samples=of_samples: put(a, mesh, *axes(np.shape(a), of_samples)),
            state.value)


def on(count):
    """A mesh of the first devices, those of all processes."""
    import jax
    import numpy as np
    return jax.sharding.Mesh(np.asarray(jax.devices()[:count]), ('devices',))


def placed(args, mesh, by, batch=None):
    """A trainer on a mesh, and its first samples there."""
    batch = batch or args.batch
    train_step, learner, kept = make_trainer(args, batch)
    spread(learner, kept, mesh, by, batch, args.neurons)
    return train_step, learner, kept, samples_on(mesh, by, samples(args, 0, batch))


def samples_on(mesh, by, drawn):
    spikes, classes = drawn
    cut = ('devices',) if by == 'samples' else ()
    return put(spikes, mesh, None, *cut), put(classes, mesh, *cut)


# ---------------------------------------------------------------------------------------------
# What the compiled programs exchange

def exchanged(program):
    """``{what: (times, bytes each time)}`` of a compiled training step, and bytes touched."""
    from traceops.benchmarks import hlo
    launched = hlo.kernels(program.as_text(), bandwidth=1e9)
    found = {}
    for kernel in hlo.exchanges(launched):
        times, most = found.get(kernel.operation, (0, 0))
        found[kernel.operation] = times + kernel.times, max(most, kernel.written)
    return found, hlo.total(launched).bytes


def compare(args):
    """One device, samples spread, neurons spread: gradients and what is exchanged."""
    import jax
    import numpy as np
    from against_upstream import difference

    import traceops
    windows = -(-args.steps // args.window)
    want = None
    for by, count in (('samples', 1), ('samples', DEVICES), ('neurons', DEVICES)):
        train_step, learner, _, drawn = placed(args, on(count), by)
        found, _ = exchanged(train_step.compile(*drawn))
        grads = jax.tree.map(np.asarray, train_step(*drawn)[1])
        want = want or grads
        worst = difference(want, grads)
        said = ', '.join(f'{times} {kind} of at most {size / 2 ** 10:.3g} KiB'
                         for kind, (times, size) in found.items()) or 'nothing is exchanged'
        print(f'{by:8} on {count}: gradients differ by {worst:.1e}; {said}')
        expect(worst <= 1e-5, f'the gradients differ by {worst:.1e}')
        weight = 4 * args.neurons ** 2
        if by == 'neurons':
            largest = max(size for _, size in found.values())
            records = 4 * args.window * args.batch * args.neurons
            expect(largest <= max(records, weight // DEVICES), 'a weight was exchanged')
        elif count > 1:
            expect(set(found) == {'all-reduce'}, f'{sorted(found)}: more than a reduction')
            expect(found['all-reduce'][0] == windows, 'not one reduction a window')
            print('\n'.join(line for line in str(traceops.explain(learner)).splitlines()
                            if ' devices' in line))


def scale(args):
    """Weak scaling by program: so many samples a device, more and more devices."""
    print('weak scaling, by program: devices, samples, MiB that a device touches, KiB reduced')
    rows = []
    for count in (1, 2, 4, DEVICES):
        batch = args.batch // DEVICES * count
        train_step, _, _, drawn = placed(args, on(count), 'samples', batch)
        found, touched = exchanged(train_step.compile(*drawn))
        rows.append((touched, found.get('all-reduce', (0, 0))[1]))
        print(f'{count:9} {batch:9} {touched / 2 ** 20:12.2f} {rows[-1][1] / 2 ** 10:12.2f}')
    touched, reduced = zip(*rows[1:], strict=True)
    expect(max(touched) <= 1.02 * min(touched) and len(set(reduced)) == 1,
           'what a device does grows with their number')


def expect(holds, otherwise):
    if not holds:
        raise SystemExit(f'not as it should be: {otherwise}')


# ---------------------------------------------------------------------------------------------
# One process of several

def train(args):
    """Train on the devices of all processes, from the last checkpoint; print the losses."""
    import jax
    import orbax.checkpoint as ocp

    import traceops
    jax.distributed.initialize(args.coordinator, PROCESSES, args.process)
    traceops.install(window=args.window)
    mesh = on(DEVICES)
    train_step, _, kept, _ = placed(args, mesh, 'samples')
    options = ocp.CheckpointManagerOptions(save_interval_steps=4, max_to_keep=2)
    with ocp.CheckpointManager(args.checkpoints.absolute(), options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            values = checkpoints.restore(
                done, args=ocp.args.StandardRestore([state.value for state in kept]))
            for state, value in zip(kept, values, strict=True):
                state.value = value
        for step in range(done, args.training_steps):
            if step == args.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            loss, _ = train_step(*samples_on(mesh, 'samples', samples(args, step)))
            print(f'loss {step} {float(loss)!r}', flush=True)
            checkpoints.save(step + 1, args=ocp.args.StandardSave([s.value for s in kept]))
            checkpoints.wait_until_finished()


def start(args, folder, die_after=None):
    """Two processes on this machine; ``(their losses by step, whether both ended well)``."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    options = [f'--{name.replace("_", "-")}={getattr(args, name)}' for name in (
        'neurons', 'batch', 'steps', 'window', 'training_steps', 'rate', 'seed')]
    logs = [folder.parent / f'process-{i}.log' for i in range(PROCESSES)]
    processes = []
    for i, log in enumerate(logs):
        more = [f'--die-after={die_after}'] if die_after is not None and i == 1 else []
        with open(log, 'w') as out:
            processes.append(subprocess.Popen(
                [sys.executable, __file__, *options, f'--process={i}', *more,
                 f'--coordinator={address}', f'--checkpoints={folder}'],
                stdout=out, stderr=subprocess.STDOUT))
    try:
        while all(p.poll() is None for p in processes):     # who is left waits for the dead
            time.sleep(0.1)
        if all(p.returncode in (0, None) for p in processes):
            [p.wait(60) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    said = logs[0].read_text()
    losses = {int(step): float(loss) for step, loss in re.findall(r'^loss (\d+) (\S+)', said, re.M)}
    ended = all(p.returncode == 0 for p in processes)
    expect(ended or die_after is not None, logs[1].read_text()[-3000:] + said[-3000:])
    return losses, ended


def alone(args):
    """The losses on one device."""
    mesh = on(1)
    train_step, *_ = placed(args, mesh, 'samples')
    return [float(train_step(*samples_on(mesh, 'samples', samples(args, step)))[0])
            for step in range(args.training_steps)]


def two_processes(args):
    """The curve of two processes; of two of which one is killed, started again; of one."""
    import numpy as np
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        whole, _ = start(args, folder / 'whole')
        first, ended = start(args, folder / 'killed', die_after=args.training_steps // 2 + 1)
        expect(not ended, 'no process was killed')
        second, _ = start(args, folder / 'killed')
        resumed = min(second)
    expect(0 < resumed < args.training_steps, 'nothing was resumed')
    expect({**first, **second} == whole, f'{first}, {second} are not {whole}')
    one = alone(args)
    worst = np.abs(np.array(one) / [whole[i] for i in sorted(whole)] - 1).max()
    expect(worst <= 1e-4, f'the curves differ by {worst:.1e}')
    print(f'{PROCESSES} processes: loss {one[0]:.3f} -> {one[-1]:.3f}, that of one device within '
          f'{worst:.1e}; one was killed, both resumed from step {resumed}: the same curve')
    return one


def main(argv=None):
    args = parse(argv)
    if args.process is not None:
        devices(DEVICES // PROCESSES)
        return train(args)
    devices(DEVICES)
    import traceops
    traceops.install(window=args.window)
    compare(args)
    scale(args)
    return {'loss': two_processes(args)}


if __name__ == '__main__':
    main()
