"""Every loss against finite differences in float64, off its kinks; and through the network."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import collapse
import dpo
import feedback
import grpo
import ppo
import reward
import rlaif
import sft
from model import entropy, last_tokens, pack, predicts, token_logprobs

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha:0.5")


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def check(function, *inputs):
    """Gradients with respect to all inputs."""
    assert gradcheck(function, [x.clone().requires_grad_() for x in inputs], eps=1e-6, atol=1e-6)


TOKENS, MASK, SEGMENTS = pack([[1, 2], [3]], [[[4, 0, 2]], [[1, 1]]])


class Fixed(torch.nn.Module):
    """A model whose output is given."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, tokens, at=None, segments=None):
        return self.output[at]


def test_what_losses_are_made_of():
    logits = draw(int(MASK.sum()), 5)
    for temperature in (1.0, 0.7):
        check(lambda x, t=temperature: token_logprobs(x, TOKENS, MASK, t), logits)
        check(lambda x, t=temperature: entropy(x, t), logits)
    statistics = {"reward_mean": 0.3, "reward_std": 1.7, "score_transform": "identity"}
    known = TOKENS, MASK, statistics
    check(lambda x: ppo.values_of(*known[:2], Fixed(x), statistics), draw(*TOKENS.shape))
    check(lambda x: rlaif.state_values(Fixed(x), TOKENS, MASK), draw(*TOKENS.shape))
    for transform in ("identity", "sigmoid"):
        known = statistics | {"score_transform": transform}
        check(lambda raw, s=known: feedback.normalised(raw, s), draw(4))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_supervised_loss(weight):
    weights = sft.loss_weights(MASK, SEGMENTS, weight)
    check(lambda x: sft.weighted_nll(Fixed(x), TOKENS, weights, SEGMENTS), draw(*TOKENS.shape, 5))


def test_reward_losses():
    margin, label = draw(3, seed=1).abs(), torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
    check(lambda a, b: reward.pairwise_loss(a, b, margin, label), draw(3), draw(3, seed=2))
    keep = torch.tensor([[True] * 6, [True, False, True, False, True, False]])
    labels, margins = torch.full((2, 6), 0.9, dtype=torch.float64), draw(2, 6, seed=3).abs()
    check(lambda x: reward.ranking_loss(x, margin=margins, label=labels, keep=keep), draw(2, 4))
    check(reward.ranking_loss, draw(2, 4))


@pytest.mark.parametrize("name", ["linear", "log", "power", "inverse_power", "log_sigmoid"])
def test_losses_of_reward_collapse(name):
    """In the right order and in the wrong one, where utilities go on as straight lines."""
    utility = collapse.scaled(collapse.utility(name, epsilon=0.1))
    kinds = torch.tensor([False, False, True])
    for smoothing, logits in itertools.product((0.0, 0.1), (draw(3, 4), draw(3, 4, seed=5))):
        smoothed = collapse.with_smoothing(utility, smoothing)
        both = {"open": smoothed, "closed": lambda x: 2 * x}
        check(lambda x, U=both: collapse.prompt_aware_loss(torch.sigmoid(x), kinds, U), logits)


def test_losses_of_policies():
    new, old, advantages = draw(2, 5, scale=0.4), draw(2, 5, seed=1, scale=0.4), draw(2, 5, seed=2)
    ratio = (new - old).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any()  # on both sides of the clip
    check(lambda x: ppo.policy_loss(x, old, advantages, 0.2), new)
    check(lambda x: grpo.clipped_loss(x, old, advantages, 0.2), new)
    check(lambda x: ppo.kl_penalty_loss(x, old, advantages, 0.7), new)
    for kind in ("k1", "k2", "k3"):
        check(lambda x, k=kind: feedback.kl_estimate(x, old, k), new)
    check(lambda x: ppo.value_loss(x, old, advantages, 0.2), draw(2, 5, seed=3))
    values, worth, mask = draw(2, 5, seed=4), draw(2, seed=5), torch.ones(2, 5)
    mask[0, 3:] = 0
    # The baseline is a constant in the policy's loss: each of the two has one input alone.
    check(lambda x: rlaif.reinforce(x, values, worth, mask)[0], new)
    check(lambda x: rlaif.reinforce(new, x, worth, mask)[1], values)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "robust"])
def test_losses_of_direct_preference(loss, divergence):
    label = torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64)
    inputs = [draw(3, seed=seed) for seed in range(4)]
    for smoothing in (0.0, 0.2):
        how = 0.3, loss, smoothing, label, divergence
        check(lambda a, b, c, d, how=how: dpo.dpo_loss(a, b, c, d, *how), *inputs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_of_rankings(divergence):
    logprobs, ref = draw(2, 4), draw(2, 4, seed=1)
    check(lambda a, b: dpo.plackett_luce_loss(a, b, 0.4, None, divergence), logprobs, ref)
    keep = torch.tensor([[True] * 6, [True, False, True, False, True, False]])
    label = torch.full((2, 6), 0.9, dtype=torch.float64)
    for loss in ("dpo", "plackett_luce", "cpl", "ipo"):
        cfg = dpo.Config(loss=loss, beta=0.4, divergence=divergence, cpl_bias=0.5)
        check(lambda a, c=cfg: dpo.preference_loss(a, ref, keep, label, c), logprobs)
    gammas = draw(2, 5, seed=3)
    check(lambda x: dpo.discounted(x, torch.ones(2, 5), 0.9), gammas)


@pytest.mark.parametrize("scalar_head", [False, True])
def test_through_the_network(small_gpt, scalar_head):
    """A loss of the whole network along random directions of all its parameters."""
    model = small_gpt(scalar_head, dtype=torch.float64, vocab_size=7)

    def loss():
        if scalar_head:
            scores = model(TOKENS, last_tokens(MASK))
            return reward.pairwise_loss(scores[:1], scores[1:]).sum()
        logits = model(TOKENS, at=predicts(MASK))
        return -token_logprobs(logits, TOKENS, MASK).sum()

    loss().backward()
    parameters = list(model.parameters())
    for seed in range(3):
        directions = [draw(*p.shape, seed=seed) for p in parameters]
        expected = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += step * d
                ends.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += 1e-5 * d
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected.item(), rel=1e-6)
