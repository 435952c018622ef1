"""How is an update made fast? The trainer's arithmetic, compiled, one network per thread.

Rules of this module
  * Same algorithm, same order of minibatches, same numbers to 1e-5 as the torch update of
    `rlv3.trainer`, which stays the reference; a test holds both together.
  * torch's modules and Adam states are the only truth: they are copied into flat vectors before
    an update (weights transposed, as the forward products want them) and back after it.
  * The networks share nothing within an update, so each has its own thread, and one thread
    computes the same bits as two. BLAS itself is held to one thread.

Needs numba and scipy (numba calls scipy's BLAS). Compiled code is cached beside this file.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401 (loads the BLAS that numba calls, to be limited below)
import torch
from numba import njit
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import nn

from rlv3.agent import PPOAgent
from rlv3.buffer import Rollout
from rlv3.config import RLv3Config
from rlv3.trainer import ADAM_EPS, KL_MARGIN

BETA1, BETA2 = 0.9, 0.999
F32 = NDArray[np.float32]
_blas = ThreadpoolController()
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})


@_compiled
def _activate(h, bias, tanh):
    """Add the bias and apply the activation, in place."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            x = h[i, j] + bias[j]
            if tanh:
                h[i, j] = math.tanh(x)
            else:
                h[i, j] = max(x, np.float32(0.0))


@_compiled
def _deactivate(d, h, tanh):
    """Turn the gradient of an activation's output `h` into that of its input, in place."""
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            if tanh:
                d[i, j] *= np.float32(1.0) - h[i, j] * h[i, j]
            elif h[i, j] <= np.float32(0.0):
                d[i, j] = np.float32(0.0)


@_compiled
def _column_sums(d, out):
    for j in range(d.shape[1]):
        out[j] = np.float32(0.0)
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            out[j] += d[i, j]


@_compiled
def _views(flat, n_in, width, n_out):
    """Return weights and biases of the three layers inside a flat vector."""
    a = n_in * width
    b = a + width
    c = b + width * width
    d = c + width
    e = d + width * n_out
    return (
        flat[:a].reshape(n_in, width),
        flat[a:b],
        flat[b:c].reshape(width, width),
        flat[c:d],
        flat[d:e].reshape(width, n_out),
        flat[e : e + n_out],
    )


@_compiled
def _forward(x, params, h1, h2, out, tanh):
    """Compute hidden layers and outputs of a batch."""
    w1, b1, w2, b2, w3, b3 = params
    np.dot(x, w1, h1)  # (B, 64) -> (B, 128)
    _activate(h1, b1, tanh)
    np.dot(h1, w2, h2)  # (B, 128) -> (B, 128)
    _activate(h2, b2, tanh)
    np.dot(h2, w3, out)  # (B, 128) -> (B, 6 or 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] += b3[j]


@_compiled
def _backward(x, params, grads, h1, h2, d_out, d1, d2, tanh):
    """Compute the gradients of all parameters from those of the outputs."""
    _, _, w2, _, w3, _ = params
    g1, c1, g2, c2, g3, c3 = grads
    np.dot(h2.T, d_out, g3)
    _column_sums(d_out, c3)
    np.dot(d_out, w3.T, d2)
    _deactivate(d2, h2, tanh)
    np.dot(h1.T, d2, g2)
    _column_sums(d2, c2)
    np.dot(d2, w2.T, d1)
    _deactivate(d1, h1, tanh)
    np.dot(x.T, d1, g1)
    _column_sums(d1, c1)


@_compiled
def _adam(flat, grad, mean, square, count, learning_rate, eps, max_norm):
    """Clip the gradient by its norm and take one Adam step, as torch does."""
    norm = math.sqrt(np.dot(grad, grad))
    scale = np.float32(min(max_norm / (norm + 1e-6), 1.0))
    first = np.float32(learning_rate / (1.0 - BETA1**count))
    second = np.float32(1.0 / math.sqrt(1.0 - BETA2**count))
    small = np.float32(eps)
    keep1, keep2 = np.float32(1.0 - BETA1), np.float32(BETA2)
    new2 = np.float32(1.0 - BETA2)
    for i in range(flat.size):
        g = grad[i] * scale
        m = mean[i] + keep1 * (g - mean[i])
        s = keep2 * square[i] + new2 * g * g
        mean[i] = m
        square[i] = s
        flat[i] -= first * m / (np.sqrt(s) * second + small)


@_compiled
def _masked_log_softmax(logits, mask, logs):
    """Write the log-probabilities of the valid actions of one row; return the entropy."""
    top = np.float32(-np.inf)
    for j in range(logits.size):
        if mask[j] and logits[j] > top:
            top = logits[j]
    total = np.float32(0.0)
    for j in range(logits.size):
        if mask[j]:
            total += np.exp(logits[j] - top)
    shift = top + np.log(total)
    entropy = np.float32(0.0)
    for j in range(logits.size):
        if mask[j]:
            logs[j] = logits[j] - shift
            entropy -= np.exp(logs[j]) * logs[j]
    return entropy


@_compiled
def _policy_gradient(
    logits, actions, masks, old_logs, advantages, clip_range, entropy_coef, logs, d_out
):
    """Write d loss / d logits; return policy loss, k3, clip fraction, entropy, each a mean."""
    n = logits.shape[0]
    loss = kl = clipped = entropies = 0.0
    one, inv = np.float32(1.0), np.float32(1.0 / n)
    low, high = np.float32(1.0 - clip_range), np.float32(1.0 + clip_range)
    bonus = np.float32(entropy_coef) * inv
    for i in range(n):
        entropy = _masked_log_softmax(logits[i], masks[i], logs)
        action, advantage = actions[i], advantages[i]
        change = logs[action] - old_logs[i]
        ratio = np.exp(change)
        plain = ratio * advantage
        bound = min(max(ratio, low), high) * advantage
        slope = -plain * inv if plain <= bound else np.float32(0.0)
        for j in range(logits.shape[1]):
            if masks[i, j]:
                p = np.exp(logs[j])
                chosen = one if j == action else np.float32(0.0)
                d_out[i, j] = slope * (chosen - p) + bonus * p * (logs[j] + entropy)
            else:
                d_out[i, j] = np.float32(0.0)
        loss -= min(plain, bound)
        kl += (ratio - one) - change
        clipped += abs(ratio - one) > np.float32(clip_range)
        entropies += entropy
    return loss / n, kl / n, clipped / n, entropies / n


@_compiled
def _value_gradient(out, old, returns, value_coef, value_clip, d_out):
    """Write d loss / d values; return the mean squared error (the clipped one if asked)."""
    n = out.shape[0]
    loss = 0.0
    factor = np.float32(2.0 * value_coef / n)
    limit = np.float32(value_clip)
    for i in range(n):
        error = out[i, 0] - returns[i]
        slope = error
        if value_clip > 0.0:
            moved = out[i, 0] - old[i]
            near = old[i] + min(max(moved, -limit), limit) - returns[i]
            if near * near > error * error:
                error = near
                slope = near if abs(moved) < limit else np.float32(0.0)
        d_out[i, 0] = factor * slope
        loss += error * error
    return loss / n


@_compiled
def _normalised(advantages, rows, out):
    """Write the minibatch's advantages with mean 0 and deviation 1."""
    n = rows.size
    mean = 0.0
    for i in range(n):
        out[i] = advantages[rows[i]]
        mean += out[i]
    if n == 1:
        return
    mean /= n
    square = 0.0
    for i in range(n):
        square += (out[i] - mean) ** 2
    scale = 1.0 / (math.sqrt(square / (n - 1)) + 1e-8)
    for i in range(n):
        out[i] = (out[i] - mean) * scale


@_compiled
def _gather(obs, rows, x):
    for i in range(rows.size):
        for j in range(obs.shape[1]):
            x[i, j] = obs[rows[i], j]


@_compiled
def _learn_policy(
    flat, mean, square, count, width, tanh, obs, actions, masks, old_logs, advantages, orders,
    batch_size, learning_rate, eps, max_norm, clip_range, entropy_coef, max_kl, totals,
):  # fmt: skip
    """Make the passes of the policy network; return minibatches measured and steps taken.

    Stops before the first step whose approximate KL exceeds `max_kl`, if that is positive. Adds
    policy loss, k3, clip fraction and entropy of every minibatch to `totals`.
    """
    n_in, n_out = obs.shape[1], masks.shape[1]
    grad = np.empty_like(flat)
    params, grads = _views(flat, n_in, width, n_out), _views(grad, n_in, width, n_out)
    x = np.empty((batch_size, n_in), np.float32)
    h1, h2 = np.empty((batch_size, width), np.float32), np.empty((batch_size, width), np.float32)
    d1, d2 = np.empty_like(h1), np.empty_like(h1)
    out, d_out = (
        np.empty((batch_size, n_out), np.float32),
        np.empty((batch_size, n_out), np.float32),
    )
    scaled, logs = np.empty(batch_size, np.float32), np.empty(n_out, np.float32)
    done = 0
    for epoch in range(orders.shape[0]):
        for start in range(0, orders.shape[1], batch_size):
            rows = orders[epoch, start : start + batch_size]
            n = rows.size
            _gather(obs, rows, x)
            _normalised(advantages, rows, scaled)
            _forward(x[:n], params, h1[:n], h2[:n], out[:n], tanh)
            loss, kl, clipped, entropy = _policy_gradient(
                out[:n], actions[rows], masks[rows], old_logs[rows], scaled, clip_range,
                entropy_coef, logs, d_out[:n],
            )  # fmt: skip
            totals[0] += loss
            totals[1] += kl
            totals[2] += clipped
            totals[3] += entropy
            if max_kl > 0.0 and kl > max_kl:
                return done + 1, done
            _backward(x[:n], params, grads, h1[:n], h2[:n], d_out[:n], d1[:n], d2[:n], tanh)
            done += 1
            _adam(flat, grad, mean, square, count + done, learning_rate, eps, max_norm)
    return done, done


@_compiled
def _learn_value(
    flat, mean, square, count, width, tanh, obs, old_values, returns, orders, batch_size,
    measured, steps, learning_rate, eps, max_norm, value_coef, value_clip,
):  # fmt: skip
    """Make the passes of the value network up to so many minibatches and steps; return the loss."""
    n_in = obs.shape[1]
    grad = np.empty_like(flat)
    params, grads = _views(flat, n_in, width, 1), _views(grad, n_in, width, 1)
    x = np.empty((batch_size, n_in), np.float32)
    h1, h2 = np.empty((batch_size, width), np.float32), np.empty((batch_size, width), np.float32)
    d1, d2 = np.empty_like(h1), np.empty_like(h1)
    out, d_out = np.empty((batch_size, 1), np.float32), np.empty((batch_size, 1), np.float32)
    done = 0
    total = 0.0
    for epoch in range(orders.shape[0]):
        for start in range(0, orders.shape[1], batch_size):
            if done == measured:
                return total / measured
            rows = orders[epoch, start : start + batch_size]
            n = rows.size
            _gather(obs, rows, x)
            _forward(x[:n], params, h1[:n], h2[:n], out[:n], tanh)
            total += _value_gradient(
                out[:n], old_values[rows], returns[rows], value_coef, value_clip, d_out[:n]
            )
            done += 1
            if done > steps:
                continue
            _backward(x[:n], params, grads, h1[:n], h2[:n], d_out[:n], d1[:n], d2[:n], tanh)
            _adam(flat, grad, mean, square, count + done, learning_rate, eps, max_norm)
    return total / measured


@_compiled
def _values(flat, width, tanh, obs, values):
    """Compute the values of many observations, in blocks that stay in the cache."""
    block = 128
    params = _views(flat, obs.shape[1], width, 1)
    h1, h2 = np.empty((block, width), np.float32), np.empty((block, width), np.float32)
    out = np.empty((block, 1), np.float32)
    for start in range(0, obs.shape[0], block):
        n = min(block, obs.shape[0] - start)
        _forward(obs[start : start + n], params, h1[:n], h2[:n], out[:n], tanh)
        values[start : start + n] = out[:n, 0]


@_compiled
def _sample(
    flat, width, tanh, obs, masks, uniforms, h1, h2, logits, logs, actions, chosen
):  # fmt: skip
    """Draw one action per row, by inverting the distribution function at a uniform number."""
    n_out = masks.shape[1]
    _forward(obs, _views(flat, obs.shape[1], width, n_out), h1, h2, logits, tanh)
    for i in range(obs.shape[0]):
        _masked_log_softmax(logits[i], masks[i], logs)
        total = 0.0
        for j in range(n_out):
            if masks[i, j]:
                total += math.exp(logs[j])
        edge, below = 0.0, uniforms[i] * total
        for j in range(n_out):
            if masks[i, j]:
                edge += math.exp(logs[j])
                actions[i] = j
                if edge > below:
                    break
        chosen[i] = logs[actions[i]]


class Flat:
    """A torch network and the moments of its Adam as flat vectors, borrowed for one update."""

    def __init__(self, network: nn.Sequential, optimiser: torch.optim.Adam | None = None) -> None:
        self._layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        self._optimiser = optimiser
        self.width = self._layers[0].out_features
        self.weights = self._pack([(layer.weight, layer.bias) for layer in self._layers])
        self.count = 0
        if optimiser is not None:
            states = [[_adam_state(optimiser, p) for p in (layer.weight, layer.bias)]
                      for layer in self._layers]  # fmt: skip
            self.count = int(states[0][0]["step"])
            self.mean = self._pack([(w["exp_avg"], b["exp_avg"]) for w, b in states])
            self.square = self._pack([(w["exp_avg_sq"], b["exp_avg_sq"]) for w, b in states])

    @staticmethod
    def _pack(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> F32:
        return np.concatenate(
            [array.detach().numpy().T.ravel() for pair in pairs for array in pair]
        )

    def give_back(self, steps: int) -> None:
        """Write weights and moments into torch's tensors, after so many Adam steps."""
        start = 0
        optimiser = self._optimiser
        assert optimiser is not None
        for layer in self._layers:
            for parameter in (layer.weight, layer.bias):
                state = optimiser.state[parameter]
                state["step"].add_(steps)
                end = start + parameter.numel()
                shape = parameter.shape[::-1]
                for target, flat in (
                    (parameter.data, self.weights),
                    (state["exp_avg"], self.mean),
                    (state["exp_avg_sq"], self.square),
                ):
                    target.copy_(torch.from_numpy(flat[start:end].reshape(shape).T))
                start = end


def _adam_state(optimiser: torch.optim.Adam, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the optimiser's state of a parameter, begun as torch would at the first step."""
    state = optimiser.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return state


class Sampler:
    """Draws the actions of a rollout from the policy as it is now."""

    def __init__(self, network: nn.Sequential, config: RLv3Config) -> None:
        n, width = config.n_envs, config.hidden_dim
        self._flat = Flat(network).weights
        self._fixed = (width, config.activation == "tanh")
        self._h1, self._h2 = (np.empty((n, width), np.float32) for _ in range(2))
        self._logits = np.empty((n, config.action_dim), np.float32)
        self._logs = np.empty(config.action_dim, np.float32)
        self._actions = np.empty(n, np.int64)
        self._chosen = np.empty(n, np.float32)

    def sample(
        self, obs: F32, masks: NDArray[np.bool_], uniforms: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], F32]:
        """Return actions int[N] and their log-probabilities; the next call overwrites both."""
        _sample(
            self._flat, *self._fixed, obs, masks, uniforms, self._h1, self._h2, self._logits,
            self._logs, self._actions, self._chosen,
        )  # fmt: skip
        return self._actions, self._chosen


def values(network: nn.Sequential, config: RLv3Config, obs: F32) -> F32:
    """Return float32[N], the values of scaled observations float32[N, 64]."""
    found = np.empty(len(obs), np.float32)
    _values(Flat(network).weights, config.hidden_dim, config.activation == "tanh", obs, found)
    return found


def learn(
    agent: PPOAgent,
    optimisers: tuple[torch.optim.Adam, torch.optim.Adam],
    rollout: Rollout,
    orders: NDArray[np.int64],
    *,
    learning_rate: float,
    clip_range: float,
    threads: int,
) -> list[float]:
    """Make the update's passes; return losses, k3, clip fraction and entropy, averaged.

    With `target_kl` the policy decides how many minibatches there are, so it goes first.

    Args:
        optimisers: of the policy and of the value network.
        orders: int[n_epochs, T], the rows in the order of each pass.
        threads: 1, or more for one per network; the result is the same.
    """
    config = agent.config
    policy = Flat(agent.policy.network, optimisers[0])
    value = Flat(agent.value.network, optimisers[1])
    tanh = config.activation == "tanh"
    adam = (learning_rate, ADAM_EPS, config.max_grad_norm)
    totals = np.zeros(4)

    def learn_policy() -> tuple[int, int]:
        return _learn_policy(
            policy.weights, policy.mean, policy.square, policy.count, policy.width, tanh,
            rollout.obs, rollout.actions, rollout.masks, rollout.log_probs, rollout.advantages,
            orders, config.batch_size, *adam, clip_range, config.entropy_coef,
            KL_MARGIN * config.target_kl, totals,
        )  # fmt: skip

    def learn_value(measured: int, steps: int) -> float:
        return _learn_value(
            value.weights, value.mean, value.square, value.count, value.width, tanh,
            rollout.obs, rollout.values, rollout.returns, orders, config.batch_size,
            measured, steps, *adam, config.value_coef, config.value_clip,
        )  # fmt: skip

    all_of_them = len(orders) * -(-orders.shape[1] // config.batch_size)
    with one_blas_thread():
        if threads > 1 and not config.target_kl:
            with ThreadPoolExecutor(1) as pool:
                loss = pool.submit(learn_value, all_of_them, all_of_them)
                measured, steps = learn_policy()
                value_loss = loss.result()
        else:
            measured, steps = learn_policy()
            value_loss = learn_value(measured, steps)
    policy.give_back(steps)
    value.give_back(steps)
    policy_loss, kl, clipped, entropy = (totals / measured).tolist()
    return [policy_loss, value_loss, kl, clipped, entropy]


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold BLAS to one thread: sums have one order, and threads of our own do not fight its."""
    return _blas.limit(limits=1)


@cache
def warm_up() -> None:
    """Compile, or load what an earlier run compiled, before any step is timed."""
    config = RLv3Config(hidden_dim=8, buffer_size=4, batch_size=4, n_epochs=1)
    agent = PPOAgent(config)
    rollout = Rollout(
        obs=np.zeros((4, config.state_dim), np.float32),
        actions=np.zeros(4, np.int64),
        masks=np.ones((4, config.action_dim), np.bool_),
        log_probs=np.zeros(4, np.float32),
        values=np.zeros(4, np.float32),
        advantages=np.zeros(4, np.float32),
        returns=np.zeros(4, np.float32),
    )
    policy, value = (torch.optim.Adam(net.parameters()) for net in (agent.policy, agent.value))
    order = np.arange(4)[None]
    learn(agent, (policy, value), rollout, order, learning_rate=0.0, clip_range=0.2, threads=1)
    row = np.zeros((1, config.state_dim), np.float32)
    Sampler(agent.policy.network, config).sample(row, np.ones((1, 6), np.bool_), np.zeros(1))
    values(agent.value.network, config, row)
