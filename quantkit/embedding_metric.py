"""Which errors of the token embedding matter: those that the first layer reads.

An embedding has no inputs, so no Hessian of inputs either; each of its rows *is* an input, of the layers.  What an error e of a row
does to the queries, keys and values of the first layer is e M e^T with M = N W^T W N, where W stacks their three matrices and N is
the norm's weight on a diagonal.  That has the form of GPTQ's loss, so the same method rounds the embedding, with M in place of the
Hessian.  Later layers read the same row through the residual stream; for them a share of the identity is added, which asks for
small errors in every direction.  Nothing but weights is needed.
"""

from __future__ import annotations

import torch

from quantkit.checkpoint import Checkpoint
from quantkit.evidence import Evidence
from quantkit.llama4 import Unit
from quantkit.team import Team, add_gram, spans
from quantkit.workspace import Workspace

SHARE_OF_OTHERS = 0.3  # of the identity, beside the first layer's metric with mean 1 on its diagonal
MANY = 1e9  # rows that the metric is formed from, as far as damping goes: it is exact, not an estimate


def embedding_evidence(checkpoint: Checkpoint, first_inputs: Unit, norm: str, team: Team) -> Evidence:
    """Evidence whose Hessian is the metric, float32 ``[hidden, hidden]``, upper triangle.

    first_inputs: the unit of queries, keys and values of the first layer.  norm: name of the norm's weight before it.
    """
    weights, _ = checkpoint.read_unit(first_inputs, Workspace())
    scale = checkpoint.read_slice(norm).to(torch.float32)
    metric = torch.zeros(len(scale), len(scale))
    for weight in weights:
        for part in spans(weight.shape[0]):
            add_gram(team, weight[part].to(torch.float32) * scale, metric)
    mean = float(metric.diagonal().mean())
    if mean > 0:
        metric /= mean * (1 + SHARE_OF_OTHERS)
    metric.diagonal().add_(SHARE_OF_OTHERS / (1 + SHARE_OF_OTHERS))
    diagonal = metric.diagonal().clone()
    return Evidence(0, diagonal, diagonal.sqrt(), metric, rows=MANY)
