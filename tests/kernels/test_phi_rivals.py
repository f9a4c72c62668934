"""Rivals in the GPU's table compute phi cross-attention: against the fp64 oracle, as far as they run on a CPU."""

from __future__ import annotations

import importlib.util
import inspect

import phi_rivals
import pytest
import torch
from gpu import kernel_oracle


def problem(phi: torch.Tensor, media: int) -> phi_rivals.Problem:
    drawn = torch.Generator().manual_seed(7)
    batch, positions = phi.shape
    q = torch.randn(batch, positions, 4, 32, generator=drawn)
    k, v = (torch.randn(8, 4, 16, 32, generator=drawn) for _ in range(2))
    rows = torch.stack([torch.randperm(8, generator=drawn)[:media] for _ in range(batch)])
    return phi_rivals.Problem(q, k, v, rows, phi)


EVEN = problem(torch.arange(1, 5).repeat_interleave(6)[None], 4)
RAGGED = problem(torch.tensor([[1] * 5 + [2] * 9 + [3] * 2 + [4] * 8]), 4)
STEP = problem(torch.full((3, 2), 4), 4)


def plain_flex(given: phi_rivals.Problem) -> phi_rivals.Call:
    return phi_rivals.flex(given, compiled=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("given", [EVEN, RAGGED, STEP], ids=["even", "ragged", "step"])
@pytest.mark.parametrize("rival", [phi_rivals.sdpa_by_image, plain_flex, phi_rivals.masked_sdpa])
def test_rivals_are_the_definition(rival, given):
    if rival is phi_rivals.sdpa_by_image and given is RAGGED:
        with pytest.raises(phi_rivals.NotAtHand, match="runs of one length"):
            rival(given)
        return
    right = kernel_oracle.attend(given.q, given.k, given.v, given.media_rows, given.phi, dtype=torch.float64)
    torch.testing.assert_close(rival(given)().double(), right, atol=2e-6, rtol=0)


def test_arguments_of_variable_length_attention_are_those_that_it_takes():
    """It runs on GPUs alone: that the call fits is what can be checked."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    inspect.signature(varlen.varlen_attn).bind("q", "k", "v", "runs", "keys", 9, 16)


def test_a_rival_that_is_not_installed_says_so():
    if importlib.util.find_spec("flashinfer") is not None:
        pytest.skip("flashinfer is installed")
    with pytest.raises(phi_rivals.NotAtHand, match="flashinfer is not installed"):
        phi_rivals.flashinfer(STEP)
