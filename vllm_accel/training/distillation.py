"""FREE's distillation of deep layers into shallow ones (arXiv 2310.05424, training loss).

States are compared after the model's final norm, whichever layer they come from, and
teachers get no gradient. Layers count from 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("last", "unif", "dyna")
"""The last layers alone; layers at even distances; these teachers, students by likeness."""

_UNEVEN = {(10, 24): (3, 6, 8, 11, 13, 16, 18, 20, 22, 24)}  # as published


def layer_pairs(
    kind: str, exit_layer: int, num_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student layers, and as many teacher layers m(i) = i * L_D / L_S, rounded up.

    Of depths that do not divide, the paper's code has one, 24 on 10, in a table of its own;
    12 on 6, which its scripts ask for, it lacks.
    """
    if kind == "last":
        return (exit_layer,), (num_layers,)
    students = tuple(range(1, exit_layer + 1))
    even = tuple(-(-i * num_layers // exit_layer) for i in students)
    return students, _UNEVEN.get((exit_layer, num_layers), even)


def distillation_loss(
    kind: str, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    """[] float32: mean over teachers of the squared distance to their student.

    Args:
        kind: one of `KINDS`.
        students: [tokens, hidden_size] each, of the layers `layer_pairs` names.
        teachers: as many, without gradient.
    """
    chosen: Sequence[int] = range(len(teachers))
    if kind == "dyna":
        chosen = aligned(_distances(students, teachers))
    pairs = zip(chosen, teachers, strict=True)
    return torch.stack([_mse(students[i], teacher) for i, teacher in pairs]).mean()


def aligned(
    distance: Tensor,  # [teachers, students]
) -> list[int]:
    """Per teacher the index of its student: KD-dyna's monotone alignment.

    From the last teacher to the first, each takes the nearest student before the one taken
    last; when none is left, that one again.
    """
    chosen: list[int] = []
    taken = distance.shape[1]
    for row in reversed(distance.tolist()):
        if taken > 0:
            taken = min(range(taken), key=row.__getitem__)
        chosen.append(taken)
    return chosen[::-1]


def joint_cross_entropy(
    shallow: Tensor, deep: Tensor, exit_layer: int, num_layers: int
) -> Tensor:
    """(L_S CE_S + L_D CE_D) / (L_S + L_D), each [] float32."""
    return (exit_layer * shallow + num_layers * deep) / (exit_layer + num_layers)


@torch.no_grad()
def _distances(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """[teachers, students] float32"""
    rows = [torch.stack([_mse(s, teacher) for s in students]) for teacher in teachers]
    return torch.stack(rows)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.mse_loss(student.float(), teacher.float())
