"""FREE's losses against values made by hand."""

import pytest
import torch
from torch.nn import functional

from vllm_accel import ConfigError
from vllm_accel.free.exit_head import ExitAdapter
from vllm_accel.training import distillation
from vllm_accel.training.distillation import aligned, distillation_loss, layer_pairs
from vllm_accel.training.shallow_deep import ShallowDeep, final_norm


@pytest.mark.parametrize(
    ("exit_layer", "num_layers", "teachers"),
    [
        (6, 24, (4, 8, 12, 16, 20, 24)),
        (8, 24, (3, 6, 9, 12, 15, 18, 21, 24)),
        (4, 24, (6, 12, 18, 24)),
        (12, 24, tuple(range(2, 25, 2))),
        (10, 24, (3, 6, 8, 11, 13, 16, 18, 20, 22, 24)),
        (3, 12, (4, 8, 12)),
        (6, 12, (2, 4, 6, 8, 10, 12)),
        (5, 12, (3, 5, 8, 10, 12)),
        (3, 32, (11, 22, 32)),
        (11, 12, (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
    ],
)
@pytest.mark.parametrize("kind", ["unif", "dyna"])
def test_teachers_stand_at_even_distances(kind, exit_layer, num_layers, teachers):
    students = tuple(range(1, exit_layer + 1))
    assert layer_pairs(kind, exit_layer, num_layers) == (students, teachers)


@pytest.mark.parametrize("exit_layer", range(1, 32))
def test_teachers_ascend_to_the_last_layer(exit_layer):
    _, teachers = layer_pairs("unif", exit_layer, 32)
    assert len(set(teachers)) == len(teachers) == exit_layer
    assert sorted(teachers) == list(teachers)
    assert teachers[-1] == 32


def test_the_last_layers_alone_are_compared():
    assert layer_pairs("last", 4, 12) == ((4,), (12,))


#       students: 0    1    2
DISTANCES = {
    "each its own": ([[0.0, 9, 9], [9, 0, 9], [9, 9, 0]], [0, 1, 2]),
    "the last takes the first": ([[9, 9, 0.0], [9, 0, 9], [0, 9, 9]], [0, 0, 0]),
    "none may be passed": ([[0, 9.0, 9], [0, 1, 9], [9, 0, 1]], [0, 0, 1]),
    "nearer ones behind are gone": ([[9.0, 0, 0], [9, 0, 0], [9, 9, 0]], [0, 1, 2]),
    "of equals the first": ([[1.0, 1, 1], [1, 1, 1], [1, 1, 1]], [0, 0, 0]),
}


@pytest.mark.parametrize("case", DISTANCES)
def test_dyna_aligns_from_the_last_teacher_on(case):
    distance, students = DISTANCES[case]
    assert aligned(torch.tensor(distance)) == students


@pytest.mark.parametrize("seed", range(20))
def test_dyna_is_monotone_and_takes_the_nearest_that_is_left(seed):
    torch.manual_seed(seed)
    distance = torch.rand(6, 6)
    chosen = aligned(distance)
    assert chosen == sorted(chosen)
    left = 6
    for teacher in reversed(range(6)):
        if left:
            assert chosen[teacher] == int(distance[teacher, :left].argmin())
        else:
            assert chosen[teacher] == 0
        left = min(left, chosen[teacher])


STUDENTS = [torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])]
TEACHERS = [torch.tensor([[4.0, 2.0]]), torch.tensor([[0.0, 2.0]])]


@pytest.mark.parametrize(
    ("kind", "students", "teachers", "loss"),
    [
        ("last", STUDENTS[1:], TEACHERS[1:], (16 + 4) / 2),
        ("unif", STUDENTS, TEACHERS, ((16 + 4) / 2 + (16 + 4) / 2) / 2),
        # The last teacher takes student 0, so the first one is left with it too.
        ("dyna", STUDENTS, TEACHERS, ((16 + 4) / 2 + 4 / 2) / 2),
    ],
)
def test_distillation_is_the_mean_square_to_the_aligned_student(
    kind, students, teachers, loss
):
    assert float(distillation_loss(kind, students, teachers)) == pytest.approx(loss)


@pytest.mark.parametrize("shift", range(3))
def test_dyna_finds_the_students_teachers_are_like(shift):
    torch.manual_seed(0)
    students = [torch.randn(5, 8) for _ in range(3)]
    teachers = [students[max(0, i - shift)] + 0.01 for i in range(3)]
    assert float(distillation_loss("dyna", students, teachers)) == pytest.approx(1e-4, 0.01)


def test_joint_cross_entropy_weighs_by_depth():
    loss = distillation.joint_cross_entropy(torch.tensor(1.0), torch.tensor(2.0), 4, 12)
    assert float(loss) == pytest.approx((4 * 1 + 12 * 2) / 16)


@pytest.fixture
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def shallow_deep(base, adapter="none", **changes):
    settings = {
        "exit_layer": 1,
        "kd": "last",
        "kd_weight": 0.5,
        "freeze_base": False,
        "follow_base": False,
    }
    return ShallowDeep(base, ExitAdapter(adapter, 64, 8), **(settings | changes))


IDS = torch.tensor([[5, 9, 2, 7], [1, 1, 3, 0]])
LABELS = torch.tensor([[-100, 9, 2, 7], [1, 1, 3, -100]])  # the last one is padding


def by_hand(base, kd_weight, deep_counts, targets=None):
    """FREE's loss with KD-last for an exit after layer 1 of 2."""
    states = base.base_model(IDS, output_hidden_states=True).hidden_states
    asked = torch.tensor([[True, True, True, False], [True, True, False, False]])
    wanted = torch.tensor([9, 2, 7, 1, 3]) if targets is None else targets
    shallow, deep = base.model.norm(states[1][asked]), states[2][asked]
    ce = 1 * functional.cross_entropy(base.lm_head(shallow), wanted)
    ce = ce + deep_counts * 2 * functional.cross_entropy(base.lm_head(deep), wanted)
    return ce / 3 + kd_weight * (shallow - deep).square().mean()


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_the_loss_is_the_papers(base, kd_weight):
    model = shallow_deep(base, kd_weight=kd_weight)
    loss = model(IDS, LABELS)["loss"]
    torch.testing.assert_close(loss, by_hand(base, kd_weight, 1))


def test_a_frozen_base_leaves_the_deep_cross_entropy_out(base):
    model = shallow_deep(base, adapter="mlp", freeze_base=True)
    with torch.no_grad():
        expected = by_hand(base, 0.5, 0)
    torch.testing.assert_close(model(IDS, LABELS)["loss"], expected)


def test_the_exit_can_learn_the_deep_layers_choices(base):
    model = shallow_deep(base, adapter="mlp", freeze_base=True, follow_base=True)
    with torch.no_grad():
        choices = base(IDS).logits.argmax(dim=-1)
        said = torch.cat([choices[0, :3], choices[1, :2]])
        expected = by_hand(base, 0.5, 0, said)
    torch.testing.assert_close(model(IDS, LABELS)["loss"], expected)


def test_teachers_get_no_gradient(base):
    model = shallow_deep(base, kd_weight=1.0)
    states = model.layer_states(IDS)
    layers = [state.flatten(0, 1) for state in states]
    _, teachers = model._distilled(layers)
    assert not any(teacher.requires_grad for teacher in teachers)


def test_a_frozen_base_gets_no_gradient_and_its_adapter_does(base):
    model = shallow_deep(base, adapter="mlp", freeze_base=True, kd="dyna")
    model(IDS, LABELS)["loss"].backward()
    assert all(p.grad is None for p in base.parameters())
    assert model.adapter.up.weight.grad.abs().sum() > 0


def test_a_whole_model_gets_gradients_in_every_layer(base):
    model = shallow_deep(base, kd="unif")
    model(IDS, LABELS)["loss"].backward()
    assert all(p.grad is not None for p in base.parameters())


def test_a_frozen_base_is_never_in_training_mode(base):
    assert not shallow_deep(base, adapter="mlp", freeze_base=True).train().base.training
    assert shallow_deep(base).train().base.training


def test_a_model_that_scales_its_logits_is_refused(base):
    base.config.logits_scaling = 8.0
    with pytest.raises(ConfigError, match=r"logits_scaling=8\.0: expected"):
        final_norm(base)


def test_a_model_without_a_known_norm_is_refused(base):
    del base.model.norm
    with pytest.raises(ConfigError, match="has no final norm that is known"):
        final_norm(base)
