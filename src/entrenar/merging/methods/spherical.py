"""Means on the sphere: slerp, nuslerp, multislerp, karcher, model_stock.

Every result lies in the span of its inputs, so their Gram matrix in float64 gives the coefficients and one weighted sum
the result (Shoemake 1985; Karcher 1977; Jang et al. 2024, "Model Stock", section 4). Row-wise variants do the same for
every row or column by itself. Letters: m inputs, B vectors (1 for a whole tensor).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.ops.merge.sums import Vote, add_gram, task_sum, weighted_sum

_NEARLY_PARALLEL = 0.9995
Coefficients = Callable[[Tensor], Tensor]  # Gram (B, m, m) float64 → (B, m)


def slerp(stack: Stack, options: Options) -> Combine:
    """From the base (t = 0) to the other model (t = 1) along the great circle; lengths are interpolated with it."""
    t = float(options["t"])
    gram = torch.zeros(2, 2, dtype=torch.float64)
    for piece in stack.pieces():
        add_gram(_with_base(piece), None, gram)
    coefficients = _slerp_coefficients(_symmetric(gram)[None], t)[0].tolist()
    return lambda piece, out: weighted_sum(_with_base(piece), coefficients, out)


def _with_base(piece: Piece) -> list[Tensor]:
    assert piece.base is not None
    return [piece.base, *piece.models]


def _slerp_coefficients(gram: Tensor, t: float) -> Tensor:
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    norms = torch.where(norms > 1e-8, norms, 1)
    cosine = (gram[:, 0, 1] / (norms[:, 0] * norms[:, 1])).clamp(-1, 1)
    return _along_the_circle(cosine, t, cosine.abs() > _NEARLY_PARALLEL)


def _along_the_circle(cosine: Tensor, t: float, straight: Tensor) -> Tensor:
    """(B, 2): the two coefficients at t; where `straight`, those of the line."""
    theta = cosine.arccos()
    sine = torch.where(straight, 1, theta.sin())
    line = torch.tensor([1 - t, t], dtype=torch.float64).expand(len(cosine), 2)
    circle = torch.stack([((1 - t) * theta).sin() / sine, (t * theta).sin() / sine], dim=1)
    return torch.where(straight[:, None], line, circle)


def nuslerp(stack: Stack, options: Options) -> Combine:
    """Slerp by two weights, of the models or, with a base, of their task vectors; flat, or by rows or columns.

    `nuslerp_flatten: false` treats every vector along the last dimension by itself, with `nuslerp_row_wise` every one
    along the first.
    """
    first, second = options["weight"]
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5

    def coefficients(gram: Tensor) -> Tensor:
        norms = gram.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-7)
        cosine = (gram[:, 0, 1] / (norms[:, 0] * norms[:, 1])).clamp(-1, 1)
        return _along_the_circle(cosine, t, cosine.arccos().sin().abs() < 1e-8)

    if options["nuslerp_flatten"]:
        return _whole(stack, coefficients)
    if options["nuslerp_row_wise"] and len(stack.shape) > 1:
        return _by_columns(stack, coefficients)
    return _by_rows(stack, coefficients)


def _whole(stack: Stack, coefficients: Coefficients) -> Combine:
    gram = torch.zeros(len(stack.models), len(stack.models), dtype=torch.float64)
    for piece in stack.pieces():
        add_gram(piece.models, piece.base, gram)
    values = coefficients(_symmetric(gram)[None])[0].tolist()
    return _span(values)


def _span(values: list[float]) -> Combine:
    """base + Σ values · δ, or without a base Σ values · x."""

    def combine(piece: Piece, out: Tensor) -> None:
        if piece.base is None:
            weighted_sum(piece.models, values, out)
        else:
            task_sum(piece.base, piece.models, [None] * len(values), Vote(values=values), out)

    return combine


def _symmetric(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).T


def _rows(piece: Piece, columns: int, dtype: torch.dtype) -> Tensor:
    """(m, rows, columns): the models, less the base if there is one."""
    stacked = torch.stack([model.to(dtype).view(-1, columns) for model in piece.models])
    return stacked if piece.base is None else stacked - piece.base.to(dtype).view(-1, columns)


def _by_rows(stack: Stack, coefficients: Coefficients) -> Combine:
    def combine(piece: Piece, out: Tensor) -> None:
        rows = _rows(piece, stack.columns, torch.float64)
        values = coefficients(torch.einsum("mrc,nrc->rmn", rows, rows))
        _finish(piece, torch.einsum("rm,mrc->rc", values, rows), out)

    return combine


def _by_columns(stack: Stack, coefficients: Coefficients) -> Combine:
    count = len(stack.models)
    width = stack.numel // max(stack.shape[0], 1)  # vectors run along the first dimension
    gram = torch.zeros(width, count, count, dtype=torch.float64)
    for piece in stack.pieces():
        for rows, columns in _segments(piece, stack, width):
            gram[columns] += torch.einsum("mrc,nrc->cmn", rows, rows)
    values = coefficients(gram)

    def combine(piece: Piece, out: Tensor) -> None:
        done = 0
        for rows, columns in _segments(piece, stack, width):
            mixed = torch.einsum("cm,mrc->rc", values[columns], rows).reshape(-1)
            _finish(_part(piece, done, mixed.numel()), mixed, out[done : done + mixed.numel()])
            done += mixed.numel()

    return combine


def _segments(piece: Piece, stack: Stack, width: int) -> list[tuple[Tensor, slice]]:
    """A piece as blocks (m, rows, columns) of the (first dimension, width) view, with the columns of each."""
    segments, at, step = [], 0, stack.columns
    while at < piece.count:
        offset = (piece.start + at) % width
        whole = (piece.count - at) // width * width if offset == 0 else 0
        count = whole or min(width - offset, piece.count - at) // step * step
        columns = width if whole else count
        segments.append((_rows(_part(piece, at, count), columns, torch.float64), slice(offset, offset + columns)))
        at += count
    return segments


def _part(piece: Piece, at: int, count: int) -> Piece:
    models = [model[at : at + count] for model in piece.models]
    base = None if piece.base is None else piece.base[at : at + count]
    return Piece(piece.start + at, count, models, base, piece.scratch)


def _finish(piece: Piece, mixed: Tensor, out: Tensor) -> None:
    mixed = mixed.reshape(-1)
    out.copy_(mixed if piece.base is None else mixed + piece.base.to(mixed.dtype))


def multislerp(stack: Stack, options: Options) -> Combine:
    """One step of the Riemannian mean from the normalised mean direction; lengths are averaged. With a base: of δ."""
    weights = torch.tensor(options["weight"], dtype=torch.float64)
    if len(stack.models) == 1:
        return _span([1.0])
    if options["normalize_weights"]:
        if float(weights.sum()) == 0:
            raise InputError(
                f"multislerp: the weights of {stack.name} add up to 0: change one, or set normalize_weights: false"
            )
        weights = weights / weights.sum()
    eps = float(options["eps"])

    def coefficients(gram: Tensor) -> Tensor:
        return _multislerp_coefficients(stack.name, gram[0], weights, eps)[None]

    return _whole(stack, coefficients)


def _multislerp_coefficients(name: str, gram: Tensor, weights: Tensor, eps: float) -> Tensor:
    lengths = gram.diagonal().sqrt()
    units = torch.diag(
        torch.where(lengths + eps > 0, 1 / (lengths + eps), 0)
    )  # row i: unit vector i in terms of the inputs
    mean = weights @ units
    length = _length(mean, gram)
    if length < eps or length == 0:
        if len(weights) > 2 and bool(weights.any()) and bool(lengths.any()):
            raise InputError(
                f"multislerp: the weighted directions of {name} cancel, so there is no mean of them: change a weight"
            )
        return weights
    mean = mean / length
    tangents = units - (units @ gram @ mean)[:, None] * mean
    step = weights @ tangents
    angle = _length(step, gram) + eps
    return (mean * angle.cos() + step * (angle.sin() / angle)) * (lengths * weights).sum()


def _length(vector: Tensor, gram: Tensor) -> Tensor:
    return (vector @ gram @ vector).clamp(min=0).sqrt()


def karcher(stack: Stack, options: Options) -> Combine:
    """The point of the sphere with the least squared angles to all inputs, iterated; lengths are averaged."""
    iterations, tolerance = int(options["max_iter"]), float(options["tol"])

    def coefficients(gram: Tensor) -> Tensor:
        return _karcher_coefficients(gram[0], iterations, tolerance)[None]

    return _whole(stack, coefficients) if len(stack.models) > 1 else _span([1.0])


def _karcher_coefficients(gram: Tensor, iterations: int, tolerance: float) -> Tensor:
    lengths = gram.diagonal().sqrt()
    there = lengths > tolerance  # the others have no direction; they only shorten the mean
    if not bool(there.any()):
        return torch.zeros_like(lengths)
    share = 1 / int(there.sum())
    units = torch.diag(torch.where(there, 1 / lengths, 0))
    mean = units.sum(0) * share
    length = _length(mean, gram)
    mean = mean / length if length >= tolerance and length > 0 else units[int(there.nonzero()[0])]
    for _ in range(iterations):
        cosines = (units @ gram @ mean).clamp(-1, 1)
        angles = cosines.arccos()
        moved = (angles >= tolerance) & (angles.sin() != 0) & there
        factors = torch.where(moved, share * angles / angles.sin(), 0)
        step = factors @ (units - cosines[:, None] * mean)
        distance = _length(step, gram)
        if distance < tolerance or distance == 0:
            break
        mean = mean * distance.cos() + step * (distance.sin() / distance)
        mean = mean / _length(mean, gram)
    return mean * lengths.sum() / len(lengths)


def model_stock(stack: Stack, options: Options) -> Combine:
    """Between the base and the mean of the models, at the place that the angle between the task vectors gives."""

    def coefficients(gram: Tensor) -> Tensor:
        count = gram.shape[1]
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        products = norms[:, :, None] * norms[:, None, :]
        cosines = (gram / products.clamp(min=1e-6)).clamp(-1, 1)
        pairs = torch.tril_indices(count, count, -1)
        cosine = cosines[:, pairs[0], pairs[1]].mean(1)
        divisor = 1 + (count - 1) * cosine
        t = torch.where(divisor.abs() < 1e-6, 0, count * cosine / divisor)  # opposed: the base stays
        return (t / count)[:, None].expand(-1, count)

    if options["filter_wise"]:
        return _by_rows(stack, coefficients)
    return _whole(stack, coefficients)
