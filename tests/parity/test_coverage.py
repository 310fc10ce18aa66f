# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The nets of the parity tests have everything in them that the engine promises to serve."""

import warnings

import brainstate
import braintrace
import saiunit as u

from tests.parity.harness import start
from tests.parity.nets import NETS

#: Every op of braintrace, by the names it has without and with a batch axis of its own.
OPS = {'etp_mv', 'etp_mm', 'etp_conv', 'etp_sp_mv', 'etp_sp_mm', 'etp_lora_mv', 'etp_lora_mm',
       'etp_emb_v', 'etp_emb', 'etp_einsum', 'etp_gmv', 'etp_gmm', 'etp_elemwise'}


def made():
    """``(net, relation)`` of every net, batched and vmapped."""
    brainstate.environ.set(dt=1. * u.ms)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, net in NETS.items():
            for vmap in (False, True):
                if not (vmap and net.not_vmapped):
                    graph = start(braintrace.compile, net, 'd_rtrl', 2, vmap).inner.graph
                    found += [(name, r) for r in graph.hidden_param_op_relations]
    return found


def every_op(relations):
    registered = {p.name for p in braintrace._op.ETP_PRIMITIVES
                  if p.name.startswith('etp_')}
    assert registered == OPS                # a later braintrace with one more needs a net for it
    assert {r.primitive.name for _, r in relations} == OPS


def every_number_of_states(relations):
    assert {g.num_state for _, r in relations for g in r.hidden_groups} == {1, 2, 3, 4, 5}


def relations_and_groups_many_to_many(relations):
    assert any(len(r.hidden_groups) > 1 for _, r in relations)
    feeding = {}
    for name, r in relations:
        for g in r.hidden_groups:
            feeding.setdefault((name, id(g)), []).append(r)
    assert any(len(rs) > 1 for rs in feeding.values())


def one_parameter_in_two_relations(relations):
    uses = [tuple(r.trainable_paths.values()) for name, r in relations if name == 'shared-weight']
    assert len(uses) > len(set(uses))


def with_and_without_bias_functions_and_many_axes(relations):
    dense = [r for _, r in relations if r.primitive.name in ('etp_mm', 'etp_mv')]
    assert {len(r.trainable_vars) for r in dense} == {1, 2}
    assert {r.eqn_params.get('weight_fn') is None for r in dense} == {True, False}
    assert {r.eqn_params.get('bias_fn') is None for r in dense} == {True, False}
    assert any(len(g.varshape) > 2 for _, r in relations for g in r.hidden_groups)


def test_the_nets_have_all_that_is_promised():
    """One test, for it is making the nets that takes long."""
    relations = made()
    every_op(relations)
    every_number_of_states(relations)
    relations_and_groups_many_to_many(relations)
    one_parameter_in_two_relations(relations)
    with_and_without_bias_functions_and_many_axes(relations)
