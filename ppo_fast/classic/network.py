"""Policy and value networks: MLPs with a gradient written by hand, and a small CNN."""

import itertools
import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_fast.classic.config import ClassicConfig

Activations = list[Tensor]  # the input of each layer of an MLP, and its output


class MLP(nn.Module):
    """Linear layers with weights [in, out], each followed by the activation (tanh, relu or none).

    The gradient comes from autograd, or from `backward`: `forward` then stores the activations, and `backward` writes
    the gradients of the weights to `gradients`. It saves overhead only: with it the update of a minibatch of 64, 256
    or 1024 steps takes 11, 6 or 4 % less time of a processor (bench/classic_parts.py).
    """

    def __init__(self, sizes: list[int], gain: float, generator: torch.Generator, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        weights = [nn.init.orthogonal_(torch.empty(x), gain, generator=generator) for x in itertools.pairwise(sizes)]
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList([torch.zeros(n) for n in sizes[1:]])
        self.layers = list(zip(self.weights, self.biases, strict=True))
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, activations: Activations | None = None) -> Tensor:
        """Compute the output [B, out] of x [B, ...]; with `activations`, append to it what `backward` needs."""
        x = x.flatten(1) if x.ndim > 2 else x
        for weight, bias in self.layers:
            if activations is not None:
                activations.append(x)
            x = torch.addmm(bias, x, weight)
            if self.activation != "none":
                x = torch.tanh_(x) if self.activation == "tanh" else torch.relu_(x)
        if activations is not None:
            activations.append(x)
        return x

    def backward(self, gradient: Tensor, activations: Activations, *, to_input: bool) -> Tensor:
        """Compute the gradients of the weights, and on request that of the input, from that of the output."""
        for i in reversed(range(len(self.layers))):
            if self.activation == "tanh":
                gradient = torch.ops.aten.tanh_backward(gradient, activations[i + 1])
            elif self.activation == "relu":
                gradient = gradient * (activations[i + 1] > 0)
            torch.mm(activations[i].T, gradient, out=self.gradients[i][0])
            torch.sum(gradient, 0, out=self.gradients[i][1])
            if i or to_input:
                gradient = gradient @ self.layers[i][0].T
        return gradient


class Pixels(nn.Module):
    """Images [B, H, W, C] or [B, C, H, W], whose shorter end is the channels, to [B, C, H, W] times `scale` [1 or H, 1
    or W, 1 or C] (or in the other order)."""

    scale: Tensor

    def __init__(self, shape: tuple[int, ...], scale: Tensor) -> None:
        super().__init__()
        self.channels_last, self.channels = shape[-1] <= shape[0], min(shape[0], shape[-1])
        self.register_buffer("scale", self._channels_first(scale[None]), persistent=False)

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.channels_last else x

    def forward(self, x: Tensor) -> Tensor:
        return self._channels_first(x).float() * self.scale


def make_trunk(
    shape: tuple[int, ...], config: ClassicConfig, pixel_scale: Tensor | None, generator: torch.Generator
) -> nn.Module:
    """Make the layers from observations [B, *shape] to features [B, hidden_size].

    They are a small CNN, or an MLP where `pixel_scale` is None.
    """
    gain = math.sqrt(2)
    if pixel_scale is None:
        sizes = [math.prod(shape), *[config.hidden_size] * config.hidden_layers]
        return MLP(sizes, gain, generator, config.activation)
    pixels = Pixels(shape, pixel_scale)
    layers: list[nn.Module] = [pixels]
    for inputs, outputs in itertools.pairwise((pixels.channels, 16, 32, 32)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)  # halves height and width, whatever they are
        nn.init.orthogonal_(convolution.weight, gain, generator=generator)
        if convolution.bias is not None:  # always: mypy has it as optional
            nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU()]
    body = nn.Sequential(*layers)
    with torch.no_grad():
        features = body(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*body, MLP([features, config.hidden_size], gain, generator, "relu"))


class Network(nn.Module):
    """Policy and value of an observation: two networks, or one with two heads (detail 13).

    Args:
        shape: of one observation.
        sizes: with `discrete`, the number of choices of each action component; else (n,), n continuous components.
        config: the options of the layers.
        discrete: the policy outputs logits of choices, else means of a Gaussian.
        pixel_scale: a CNN that multiplies images by this; None: an MLP.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sizes: tuple[int, ...],
        config: ClassicConfig,
        *,
        discrete: bool,
        pixel_scale: Tensor | None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        actions = sum(sizes)
        self.discrete, self.shared, self.sizes = discrete, config.shared, sizes
        self.policy_trunk = make_trunk(shape, config, pixel_scale, generator)
        self.value_trunk = self.policy_trunk if config.shared else make_trunk(shape, config, pixel_scale, generator)
        width = math.prod(shape) if pixel_scale is None and not config.hidden_layers else config.hidden_size
        self.policy_head = MLP([width, actions], 0.01, generator)  # first actions are nearly uniform
        self.value_head = MLP([width, 1], 1.0, generator)
        if not discrete:  # the standard deviation does not depend on the observation
            self.log_std = nn.Parameter(torch.full((actions,), float(config.log_std_init)))

    def policy(self, x: Tensor) -> Tensor:
        """Compute logits or means [B, A] of observations [B, *shape]."""
        return self.policy_head.forward(self.policy_trunk.forward(x))  # nn.Module's __call__ takes as long as a layer

    def value(self, x: Tensor) -> Tensor:
        """Compute the values [B] of observations [B, *shape]."""
        return self.value_head.forward(self.value_trunk.forward(x)).view(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shared:
            return self.policy(x), self.value(x)
        features = self.policy_trunk(x)
        return self.policy_head(features), self.value_head(features).view(-1)

    @torch.no_grad()
    def forward_with_cache(self, x: Tensor) -> tuple[Tensor, Tensor, list[Activations]]:
        """Compute `forward` of MLPs, and the activations for `backward`; policy and values are leaves of autograd."""
        activations: list[Activations] = [[], [], [], []]
        policy_in, value_in, policy_out, value_out = activations
        features = self.policy_trunk.forward(x, policy_in)
        value_features = features if self.shared else self.value_trunk.forward(x, value_in)
        policy = self.policy_head.forward(features, policy_out)
        values = self.value_head.forward(value_features, value_out).view(-1)
        return policy.requires_grad_(), values.requires_grad_(), activations

    @torch.no_grad()
    def backward(self, policy_grad: Tensor, value_grad: Tensor, activations: list[Activations]) -> None:
        """Compute the gradients of all layers from those of the policy's output and of the values."""
        policy_in, value_in, policy_out, value_out = activations
        policy_grad = self.policy_head.backward(policy_grad, policy_out, to_input=True)
        value_grad = self.value_head.backward(value_grad[:, None], value_out, to_input=True)
        # `forward_with_cache` is for MLPs only; the trunks have the type nn.Module
        assert isinstance(self.policy_trunk, MLP)
        assert isinstance(self.value_trunk, MLP)
        if self.shared:
            self.policy_trunk.backward(policy_grad + value_grad, policy_in, to_input=False)
        else:
            self.policy_trunk.backward(policy_grad, policy_in, to_input=False)
            self.value_trunk.backward(value_grad, value_in, to_input=False)

    @overload
    def logprobs(self, policy: Tensor, actions: Tensor, *, with_entropy: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @overload
    def logprobs(self, policy: Tensor, actions: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]: ...
    def logprobs(self, policy: Tensor, actions: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the log-probability [B] of each action and on request the entropy [B], in nats.

        Args:
            policy: what `policy` returned, [B, A].
            actions: [B] choices, [B, components] choices, or [B, A] numbers.
            with_entropy: return the entropy, too.
        """
        if not self.discrete:
            z = (actions - policy) * torch.exp(-self.log_std)
            constant = self.log_std.sum() + 0.5 * len(self.log_std) * math.log(2 * math.pi)
            logp = -0.5 * z.square().sum(-1) - constant
            return logp, (constant + 0.5 * len(self.log_std)).expand_as(logp) if with_entropy else None
        if actions.ndim > 1:  # several components, each with its own logits
            columns = zip(policy.split(self.sizes, -1), actions.unbind(-1), strict=True)
            logps, entropies = zip(*(self.logprobs(*x, with_entropy=with_entropy) for x in columns), strict=True)
            return sum(logps), sum(entropies) if with_entropy else None
        if not with_entropy:
            return -F.cross_entropy(policy, actions, reduction="none"), None
        table = torch.log_softmax(policy, -1)  # ppo.token_logprobs is made for vocabularies, not for a few actions
        return table.gather(1, actions[:, None])[:, 0], -(table.exp() * table).sum(-1)
