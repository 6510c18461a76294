"""How LoRA sits on each kind of layer: linear, transformers' Conv1D, and two-dimensional convolution.

Every kind comes down to the same picture: an instance has some positions (tokens, or places of a convolution's output);
at each the layer maps a vector of d_in numbers to one of d_out, and LoRA adds (alpha / r) · B · A to that map. For a
convolution the vector is the patch under the kernel, so d_in is channels · height · width of the kernel, which is also
how peft does it: A is a convolution of r channels, B a 1 x 1 convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from repmatch.datamodels import Matrix
from repmatch.errors import ModelError, SharedUseError


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a layer's weight can be adapted.

    Args:
        layer: any module.

    Returns:
        True for linear layers (quantised ones too), transformers' Conv1D, and convolutions in two dimensions with one
        group, no dilation and zero padding.
    """
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and set(layer.dilation) == {1}
    return isinstance(layer, nn.Linear) or _is_conv1d(layer)


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def matrix_of(name: str, layer: Any) -> Matrix:
    """Return the matrix that a layer's weight is.

    Args:
        name: the layer's name.
        layer: an adaptable layer.

    Returns:
        Its name, d_out and d_in.
    """
    if isinstance(layer, nn.Conv2d):
        kernel = layer.kernel_size
        return Matrix(name, layer.out_channels, layer.in_channels * kernel[0] * kernel[1])
    if _is_conv1d(layer):
        return Matrix(name, int(layer.nf), int(layer.weight.shape[0]))
    return Matrix(name, layer.out_features, layer.in_features)


def as_matrix(layer: Any, weight: Tensor) -> Tensor:
    """Return a layer's weight, or a change of it, as the matrix that `matrix_of` speaks of.

    Args:
        layer: an adaptable layer.
        weight: in the layer's own shape.

    Returns:
        (d_out, d_in).
    """
    return weight.T if _is_conv1d(layer) else weight.flatten(1)


def given(args: tuple[Tensor, ...], options: Mapping[str, Tensor]) -> Tensor:
    """Return what a layer was called with.

    Args:
        args: its positional arguments.
        options: its named ones.

    Returns:
        The input, which is the only argument, whatever its name.
    """
    return args[0] if args else next(iter(options.values()))


def refuse_several(name: str, output: Any) -> None:
    """Refuse a layer that gives more than its product, as some routers of experts do.

    Args:
        name: the layer's name.
        output: what it gave.

    Raises:
        ModelError: it is no tensor.
    """
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the layer {name!r} gives a {type(output).__name__}; expected a tensor, what comes in times the weight. "
            "Adapt other layers with --targets."
        )


def refuse_shared(name: str, x: Tensor, count: int) -> None:
    """Refuse an input that a whole batch shares: what it adds to the gradient is known for the sum of instances only.

    DeBERTa-v2 has such inputs: its query also maps the relative positions, once for all instances.

    Args:
        name: the layer's name.
        x: its input.
        count: instances, or adapters, of the batch.

    Raises:
        SharedUseError: the input's first dimension is 1 and there are more instances.
    """
    if x.shape[0] == 1 and count > 1:
        raise SharedUseError(
            f"the layer {name!r} is given {tuple(x.shape)} for a batch of {count}: one input that all share, so that "
            "the instances can only be taken one by one here. Adapt another layer with --targets."
        )


def project(layer: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """Compute A x at every position, one A for all instances.

    Args:
        layer: the layer.
        x: its input.
        a: (r, d_in).

    Returns:
        (n, positions, r), or (N, ..., r) with N a multiple of the instances, as the input has it.
    """
    if isinstance(layer, nn.Conv2d):
        kernel = a.reshape(len(a), layer.in_channels, *layer.kernel_size)
        found: Tensor = functional.conv2d(x, kernel, None, layer.stride, layer.padding)
        return found.flatten(2).transpose(1, 2)
    return x @ a.T


def positions(layer: nn.Module, y: Tensor, count: int) -> Tensor:
    """Bring an output, or a gradient of it, into the order instance, position, number.

    Args:
        layer: the layer.
        y: like the layer's output.
        count: instances; the output's first dimension is this or a multiple of it (flattened tokens, windows).

    Returns:
        (count, positions, d_out).
    """
    if isinstance(layer, nn.Conv2d):
        y = y.flatten(2).transpose(1, 2)
    return y.reshape(count, -1, y.shape[-1])


def patches(layer: nn.Module, x: Tensor, count: int) -> Tensor:
    """Bring an input into the order instance, position, number.

    Args:
        layer: the layer.
        x: its input.
        count: instances.

    Returns:
        (count, positions, d_in); for a convolution each position's patch.
    """
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        x = functional.unfold(x, layer.kernel_size, padding=padding, stride=layer.stride).transpose(1, 2)
    return x.reshape(count, -1, x.shape[-1])


def like_output(layer: nn.Module, y: Tensor, output: Tensor) -> Tensor:
    """Bring (count, positions, d_out) back into the shape of the layer's output.

    Args:
        layer: the layer.
        y: what `positions` returned, or something of its shape.
        output: the layer's output.

    Returns:
        Like `output`.
    """
    if isinstance(layer, nn.Conv2d):
        return y.reshape(len(output), -1, y.shape[-1]).transpose(1, 2).reshape(output.shape)
    return y.reshape(output.shape)


def can_be_added_to(layer: Any) -> bool:
    """Whether a matrix can be added to a layer's weight exactly: not where it is quantised.

    Args:
        layer: an adaptable layer.

    Returns:
        True or False.
    """
    kind = type(layer)
    return bool(layer.weight.is_floating_point()) and (not kind.__name__.startswith("Linear") or kind is nn.Linear)


def add_to_weight(layer: Any, delta: Tensor) -> None:
    """Add a matrix to a layer's weight, on this layer alone: a weight that another module shares stays as it was there.

    Args:
        layer: an adaptable layer.
        delta: (d_out, d_in).

    Raises:
        ModelError: the layer is quantised; nothing can be added to it exactly.
    """
    weight = layer.weight
    if not can_be_added_to(layer):
        raise ModelError(
            f"a warm start cannot be merged into the quantised layer {type(layer).__name__}; expected a model in full "
            "precision. Leave --warm-start out, or use the model that is not quantised."
        )
    shaped = delta.T if _is_conv1d(layer) else delta.reshape(weight.shape)
    layer.weight = nn.Parameter((weight.detach() + shaped.to(weight)).contiguous(), requires_grad=False)
