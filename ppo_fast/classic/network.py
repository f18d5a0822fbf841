"""The networks of classic.py, their optimizer, and running moments.

Small networks spend their time on a CPU in calling operations, so the gradients of an MLP are written down by hand, and
Adam works on one flat tensor of all weights.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_fast.classic.config import ClassicConfig


class Dense(nn.Module):
    """Linear layers, weights [in, out], each with the activation (tanh, relu or none) after it.

    The gradient can be had from autograd, or by hand, which is a fifth quicker in a small network: `forward` then keeps
    each layer's input and the output on a tape, and `backward` writes the weights' gradients to `gradients`.
    """

    def __init__(self, sizes: list[int], gain: float, generator: torch.Generator, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        weights = [nn.init.orthogonal_(torch.empty(x), gain, generator=generator) for x in itertools.pairwise(sizes)]
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList([torch.zeros(n) for n in sizes[1:]])
        self.layers = list(zip(self.weights, self.biases, strict=True))
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, tape: list[Tensor] | None = None) -> Tensor:
        x = x.flatten(1) if x.ndim > 2 else x
        for weight, bias in self.layers:
            if tape is not None:
                tape.append(x)
            x = torch.addmm(bias, x, weight)
            if self.activation != "none":
                x = torch.tanh_(x) if self.activation == "tanh" else torch.relu_(x)
        if tape is not None:
            tape.append(x)
        return x

    def backward(self, gradient: Tensor, tape: list[Tensor], *, to_input: bool) -> Tensor:
        """From the loss's gradient by the output to those by the weights and, on request, by the input."""
        for i in reversed(range(len(self.layers))):
            if self.activation == "tanh":
                gradient = torch.ops.aten.tanh_backward(gradient, tape[i + 1])
            elif self.activation == "relu":
                gradient = gradient * (tape[i + 1] > 0)
            torch.mm(tape[i].T, gradient, out=self.gradients[i][0])
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
        self.last, self.channels = shape[-1] <= shape[0], min(shape[0], shape[-1])
        self.register_buffer("scale", self._channels_first(scale[None]), persistent=False)

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.last else x

    def forward(self, x: Tensor) -> Tensor:
        return self._channels_first(x).float() * self.scale


def make_trunk(
    shape: tuple[int, ...], config: ClassicConfig, pixel_scale: Tensor | None, generator: torch.Generator
) -> nn.Module:
    """Observations [B, *shape] to features [B, hidden_size]: a small CNN, or with pixel_scale=None an MLP."""
    gain = math.sqrt(2)
    if pixel_scale is None:
        sizes = [math.prod(shape), *[config.hidden_size] * config.hidden_layers]
        return Dense(sizes, gain, generator, config.activation)
    pixels = Pixels(shape, pixel_scale)
    layers: list[nn.Module] = [pixels]
    for inputs, outputs in itertools.pairwise((pixels.channels, 16, 32, 32)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)  # halves height and width, whatever they are
        nn.init.orthogonal_(convolution.weight, gain, generator=generator)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        layers += [convolution, nn.ReLU()]
    body = nn.Sequential(*layers)
    with torch.no_grad():
        features = body(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*body, Dense([features, config.hidden_size], gain, generator, "relu"))


class Network(nn.Module):
    """Policy and value of an observation: two networks, or one with two heads (detail 13).

    Args:
        shape: of one observation.
        sizes: with `discrete`, the choices of each action that is taken at once; else (n,), n numbers.
        config: what the layers are like.
        discrete: the policy gives logits of choices, else means of a Gaussian.
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
        self.policy_head = Dense([width, actions], 0.01, generator)  # first actions are nearly uniform
        self.value_head = Dense([width, 1], 1.0, generator)
        if not discrete:  # the spread does not depend on the observation
            self.log_std = nn.Parameter(torch.full((actions,), float(config.log_std_init)))

    def policy(self, x: Tensor) -> Tensor:
        """[B, *shape] to logits or means [B, A]."""
        return self.policy_head.forward(self.policy_trunk.forward(x))  # nn.Module's __call__ takes as long as a layer

    def value(self, x: Tensor) -> Tensor:
        """[B, *shape] to [B]."""
        return self.value_head.forward(self.value_trunk.forward(x)).view(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shared:
            return self.policy(x), self.value(x)
        features = self.policy_trunk(x)
        return self.policy_head(features), self.value_head(features).view(-1)

    @torch.no_grad()
    def taped(self, x: Tensor) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """`forward` of MLPs and the tapes for `backward`; policy and values are leaves to autograd."""
        tapes: list[list[Tensor]] = [[], [], [], []]
        features = self.policy_trunk.forward(x, tapes[0])
        others = features if self.shared else self.value_trunk.forward(x, tapes[1])
        policy = self.policy_head.forward(features, tapes[2])
        values = self.value_head.forward(others, tapes[3]).view(-1)
        return policy.requires_grad_(), values.requires_grad_(), tapes

    @torch.no_grad()
    def backward(self, by_policy: Tensor, by_values: Tensor, tapes: list[list[Tensor]]) -> None:
        """The gradients of all layers, from the loss's gradients by policy and values."""
        left = self.policy_head.backward(by_policy, tapes[2], to_input=True)
        right = self.value_head.backward(by_values[:, None], tapes[3], to_input=True)
        if self.shared:
            self.policy_trunk.backward(left + right, tapes[0], to_input=False)  # type: ignore[operator]
        else:
            self.policy_trunk.backward(left, tapes[0], to_input=False)  # type: ignore[operator]
            self.value_trunk.backward(right, tapes[1], to_input=False)  # type: ignore[operator]

    def logprobs(self, policy: Tensor, actions: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each action [B] and on request the entropy [B], in nats, from what `policy` returned."""
        if not self.discrete:
            z = (actions - policy) * torch.exp(-self.log_std)
            constant = self.log_std.sum() + 0.5 * len(self.log_std) * math.log(2 * math.pi)
            logp = -0.5 * z.square().sum(-1) - constant
            return logp, (constant + 0.5 * len(self.log_std)).expand_as(logp) if with_entropy else None
        if actions.ndim > 1:  # several choices, each from logits of its own
            columns = zip(policy.split(self.sizes, -1), actions.unbind(-1), strict=True)
            logps, entropies = zip(*(self.logprobs(*x, with_entropy=with_entropy) for x in columns), strict=True)
            return sum(logps), sum(entropies) if with_entropy else None
        if not with_entropy:
            return -F.cross_entropy(policy, actions, reduction="none"), None
        table = torch.log_softmax(policy, -1)  # ppo.token_logprobs is made for vocabularies, not for a few actions
        return table.gather(1, actions[:, None])[:, 0], -(table.exp() * table).sum(-1)
