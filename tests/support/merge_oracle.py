"""The merge methods in float64 NumPy, written from the papers: slow, with sorts, one tensor at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Sequence[float]


def linear(models: list[Array], weight: Weights, normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return np.asarray(total / sum(weight) if normalize else total)


def top(delta: Array, count: int) -> Array:
    """Only the `count` largest magnitudes, the first of equal ones."""
    order = np.argsort(-np.abs(delta.astype(np.float32).ravel()), kind="stable")[:count]
    kept = np.zeros(delta.size)
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


def trimmed(delta: Array, density: float) -> Array:
    return delta if density >= 1 else top(delta, max(1, int(density * delta.size)))


def band(delta: Array, density: float, gamma: float) -> Array:
    n, kept = delta.size, int(density * delta.size)
    if density >= 1:
        return delta
    bottom = max(0, n - kept - int(gamma * n))
    return top(delta, n - bottom) - top(delta, n - bottom - kept)


def summed(base: Array, deltas: list[Array], weight: Weights, lam: float = 1.0, normalize: bool = False) -> Array:
    total = np.sum([w * d for w, d in zip(weight, deltas, strict=True)], axis=0)
    return base + lam * total / (sum(weight) if normalize else 1)


def elected(
    base: Array, deltas: list[Array], weight: Weights, lam: float = 1.0, normalize: bool = True, ties: str = "mergekit"
) -> Array:
    weighted = [w * d for w, d in zip(weight, deltas, strict=True)]
    votes = np.sum(weighted if ties == "mergekit" else deltas, axis=0)
    sign = np.where(votes > 0, 1, np.where(votes < 0, -1, 1 if ties == "mergekit" else 0))
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    for w, own, plain in zip(weight, weighted, deltas, strict=True):
        agrees = (own if ties == "mergekit" else plain) * sign > 0
        total += np.where(agrees, own, 0)
        divisor += np.where(agrees, 1 if ties == "peft" else w, 0)
    return base + lam * (total / np.where(divisor == 0, 1, divisor) if normalize else total)


def slerp(a: Array, b: Array, t: float) -> Array:
    cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def nuslerp(models: list[Array], weight: Weights, base: Array | None, axis: int | None) -> Array:
    a, b = models if base is None else [model - base for model in models]
    t = weight[1] / (weight[0] + weight[1])
    if axis is None:
        merged = slerp(a, b, t)
    else:
        pairs = zip(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), strict=True)
        merged = np.moveaxis(np.stack([slerp(x, y, t) for x, y in pairs]), 0, axis)
    return merged if base is None else base + merged


def multislerp(models: list[Array], weight: Weights, base: Array | None) -> Array:
    """Exponential map, at the normalised weighted mean, of the weighted mean of the tangents."""
    vectors = [(model if base is None else model - base).ravel() for model in models]
    shares = np.array(weight) / np.sum(weight)
    lengths = np.array([np.linalg.norm(v) for v in vectors])
    units = [v / length for v, length in zip(vectors, lengths, strict=True)]
    mean = np.sum([s * u for s, u in zip(shares, units, strict=True)], axis=0)
    mean /= np.linalg.norm(mean)
    step = np.sum([s * (u - (u @ mean) * mean) for s, u in zip(shares, units, strict=True)], axis=0)
    angle = np.linalg.norm(step)
    merged = (mean * np.cos(angle) + step * np.sin(angle) / angle) * (shares @ lengths)
    return merged.reshape(models[0].shape) + (0 if base is None else base)


def karcher(models: list[Array], iterations: int = 200) -> Array:
    """Gradient descent on the sum of squared angles."""
    vectors = [model.ravel() for model in models]
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = np.sum(units, axis=0) / np.linalg.norm(np.sum(units, axis=0))
    for _ in range(iterations):
        angles = [np.arccos(np.clip(u @ mean, -1, 1)) for u in units]
        step = np.mean([a / np.sin(a) * (u - (u @ mean) * mean) for a, u in zip(angles, units, strict=True)], axis=0)
        distance = np.linalg.norm(step)
        if distance < 1e-12:
            break
        mean = mean * np.cos(distance) + step / distance * np.sin(distance)
    length = np.mean([np.linalg.norm(v) for v in vectors])
    return (mean / np.linalg.norm(mean) * length).reshape(models[0].shape)


def model_stock(models: list[Array], base: Array) -> Array:
    deltas = [(model - base).ravel() for model in models]
    n = len(deltas)
    cosines = [
        deltas[i] @ deltas[j] / (np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j]))
        for i in range(n)
        for j in range(i)
    ]
    c = float(np.mean(cosines))
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(models, axis=0) + (1 - t) * base


def sce(models: list[Array], base: Array, select_topk: float) -> Array:
    deltas = np.stack([model - base for model in models])
    if select_topk < 1:
        variance = np.stack([(m.astype(np.float32) - base.astype(np.float32)) for m in models]).var(axis=0)
        count = int(np.count_nonzero(variance) * select_topk)
        deltas = deltas * (top(variance + 0.0, count) != 0)
    weight = (deltas**2).reshape(len(models), -1).mean(axis=1)
    weight = (weight / weight.sum()).reshape(-1, *[1] * base.ndim)
    agrees = deltas * np.where(deltas.sum(axis=0) >= 0, 1, -1) > 0
    return base + (deltas * weight * agrees).sum(axis=0) / np.maximum((weight * agrees).sum(axis=0), 1e-6)


def nearswap(model: Array, base: Array, t: float) -> Array:
    distance = np.abs(model - base)
    share = np.where(distance <= t, 1, t / np.where(distance == 0, 1, distance))
    return share * model + (1 - share) * base


def ram(models: list[Array], base: Array, epsilon: float) -> Array:
    deltas = np.stack([model - base for model in models])
    changed = np.abs(deltas) > epsilon
    return base + (deltas * changed).sum(axis=0) / np.maximum(changed.sum(axis=0), 1)


def arcee_fusion(model: Array, base: Array) -> Array:
    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    p, q = softmax(model), softmax(base)
    scores = np.abs(model - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(scores.ravel())
    first, median, third = np.quantile(ordered, [0.25, 0.5, 0.75], method="lower")
    limit = median + 1.5 * (third - first)
    return base + (model - base) * (scores >= limit)


def fisher(models: list[Array], information: list[Array], weight: Weights) -> Array:
    shares = [w * f for w, f in zip(weight, information, strict=True)]
    total = np.sum([share * model for share, model in zip(shares, models, strict=True)], axis=0)
    divisor = np.sum(shares, axis=0)
    return np.where(divisor > 0, total / np.where(divisor > 0, divisor, 1), linear(models, weight))


def regmean(models: list[Array], products: list[Array], weight: Weights, alpha: float) -> Array:
    smoothed = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in products]
    right = np.sum([w * model @ g for w, model, g in zip(weight, models, smoothed, strict=True)], axis=0)
    left = np.sum([w * g for w, g in zip(weight, smoothed, strict=True)], axis=0)
    return np.asarray(np.linalg.solve(left, right.T).T)
