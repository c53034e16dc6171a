"""What an attack is made of: transforms, gradient models, callbacks, chains of links, and a minimal search, by public
names; and the four attacks of examples/own_attacks.py, which are made of these."""

from __future__ import annotations

import re
import runpy
import traceback
from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from orthattack import (
    APGD,
    FGSM,
    MIFGSM,
    NIFGSM,
    PGD,
    AutoAttack,
    Bisection,
    ModelChangedError,
    OrthoAPGD,
    OrthoFGSM,
    OrthoPGD,
    OrthoVMIFGSM,
    fooled,
)
from orthattack.attacks import Attack, Climb, ScoredStep
from orthattack.attacks.rules import chain, momentum, normalize, smooth, variance
from orthattack.threat import perturbation_norm

pytestmark = pytest.mark.heavy

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_attacks.py"
PROOFS = runpy.run_path(str(EXAMPLE))
NAMES = ["DIFGSM", "TIFGSM", "VMIFGSM", "FMN"]
RADII = {"linf": 0.15, "l2": 2.0, "l1": 12.0}
norms = pytest.mark.parametrize("norm", list(RADII))
GRADIENT = [FGSM, OrthoFGSM, PGD, OrthoPGD, MIFGSM, NIFGSM, OrthoVMIFGSM, APGD, OrthoAPGD, AutoAttack]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network, and 48 images that it has learnt."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 4
    images = 0.5 * torch.rand(4, 3, 8, 8, generator=draw)[labels] + 0.5 * torch.rand(48, 3, 8, 8, generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                              nn.Linear(32, 4))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), images, labels


def quick(kind, model, **options):
    steps = {} if kind in (FGSM, OrthoFGSM) else {"steps": 4}
    steps |= {"queries": 4, "targets": 2} if kind is AutoAttack else {}
    return kind(model, **{"eps": 0.06, **steps, **options})


def assert_judged(result, model, images, labels):
    """Each verdict is the model's own answer about the image that came back."""
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    delta = result.adversarials.double() - images.double()
    torch.testing.assert_close(result.norm, perturbation_norm(delta, "linf"), atol=0, rtol=1e-12)


def darkened(images, draws):
    return images * (0.5 + 0.5 * draws.uniform(1, 1, 1))


class Flattened(nn.Module):
    """A model whose gradient is masked by rounding."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner((images * 255).round() / 255)


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_with_a_transform_the_model_itself_judges(trained, kind, batch_size):
    model, images, labels = trained
    result = quick(kind, model, transform=darkened).run(images, labels, batch_size=batch_size)
    assert_judged(result, model, images, labels)
    assert result.success.sum() > 0
    assert result.norm.max() <= 0.06 * (1 + 1e-6)


def test_gradients_are_those_at_the_transformed_points(trained):
    model, images, labels = trained
    x = images.clone().requires_grad_()
    functional.cross_entropy(model(x.flip(3) ** 2), labels, reduction="sum").backward()
    found = FGSM(model, eps=0.03, loss="ce", transform=lambda seen, _: seen.flip(3) ** 2).run(images, labels)
    kept = found.adversarials != images  # the image itself where the step is no gain
    moved = kept.flatten(1).any(1)
    expected = (images + 0.03 * x.grad.sign()).clamp(0, 1)
    assert moved.sum() > 10
    torch.testing.assert_close(found.adversarials[moved], expected[moved], rtol=0, atol=1e-6)
    assert found.forward_calls.tolist() == [3] * 48  # two of the model itself, one for the gradient
    assert found.gradient_calls.tolist() == [1] * 48


@pytest.mark.parametrize("kind", [PGD, OrthoAPGD, MIFGSM])
@pytest.mark.parametrize("early_stop", [False, True])
def test_what_a_transform_draws_depends_on_no_neighbour(trained, kind, early_stop):
    inner, images, labels = trained

    def model(x):  # each image for itself, with the same bits in any batch
        return torch.cat([inner(one[None]) for one in x])

    attack = quick(kind, model, transform=darkened, early_stop=early_stop, eps=0.03, loss="ce")
    together = attack.run(images[:5], labels[:5], seeds=[4, 2, 7, 4, 0])
    alone = attack.run(images[3:4], labels[3:4], seeds=[4], batch_size=1)
    other = attack.run(images[3:4], labels[3:4], seeds=[5])
    assert torch.equal(alone.adversarials[0], together.adversarials[3])
    assert torch.equal(attack.run(images[:5], labels[:5], seeds=[4, 2, 7, 4, 0], batch_size=2).adversarials,
                       together.adversarials)  # fmt: skip
    assert not torch.equal(other.adversarials, alone.adversarials)


def test_without_seeds_the_draws_go_on_from_the_attacks_generator(trained):
    model, images, labels = trained
    made = [FGSM(model, transform=darkened, eps=0.02, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    first, again = (attack(images, labels) for attack in made)
    assert torch.equal(first, again)
    assert not torch.equal(made[0](images, labels), first)


def test_draws_are_uniform_and_normal_and_each_samples_own(trained):
    model, images, labels = trained
    seen = []

    def looking(x, draws):
        seen.append((draws.uniform(500), draws.normal(2, 250)))
        return x

    FGSM(model, transform=looking).run(images[:3], labels[:3], seeds=[1, 2, 1])
    ((uniform, normal),) = seen
    assert (uniform.shape, normal.shape) == ((3, 500), (3, 2, 250))
    assert torch.equal(uniform[0], uniform[2])
    assert not torch.equal(uniform[0], uniform[1])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    torch.testing.assert_close(uniform.mean(1), torch.full((3,), 0.5), rtol=0, atol=0.05)
    torch.testing.assert_close(normal.flatten(1).std(1), torch.ones(3), rtol=0, atol=0.1)


def test_eot_samples_average_a_transforms_gradients(trained):
    model, images, labels = trained
    drawn = []

    def noisy(x, draws):
        drawn.append(0.1 * draws.normal(3, 8, 8))
        return x + drawn[-1]

    result = PGD(model, norm="l2", eps=0.05, steps=1, alpha=0.05, random_start=False, transform=noisy,
                 eot_samples=3, loss="ce").run(images, labels)  # fmt: skip
    x = images.clone().requires_grad_()
    sum(functional.cross_entropy(model(x + noise), labels, reduction="sum") for noise in drawn).backward()
    assert len(drawn) == 3
    step = result.adversarials - images
    moved = step.flatten(1).any(1)
    assert moved.sum() > 10
    cosines = functional.cosine_similarity(step.flatten(1), x.grad.flatten(1))[moved]
    assert (cosines > 0.99).sum() >= 0.9 * moved.sum()  # less where a bound cuts the step


@pytest.mark.parametrize("kind", GRADIENT)
def test_gradients_of_another_model_pass_a_masked_one(trained, kind):
    inner, images, labels = trained
    model = Flattened(inner)
    result = quick(kind, model, gradient_model=inner).run(images, labels)
    assert_judged(result, model, images, labels)
    assert result.success.sum() > 5
    assert not result.zero_gradients.any()


def test_a_surrogate_is_asked_for_gradients_and_the_model_for_verdicts(trained):
    model, images, labels = trained
    calls = {"model": 0, "surrogate": 0}

    def counted(name, inner):
        def forward(x):
            calls[name] += x.requires_grad if name == "surrogate" else 1
            assert x.requires_grad is (name == "surrogate")
            return inner(x)

        return forward

    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    attack = PGD(counted("model", model), eps=0.03, steps=3, gradient_model=counted("surrogate", other))
    result = attack.run(images, labels)
    assert calls["surrogate"] == 3
    assert_judged(result, model, images, labels)
    assert result.gradient_calls.tolist() == [3] * 48
    assert result.forward_calls.tolist() == [7] * 48  # 4 of the model, 3 of the surrogate
    assert all(parameter.grad is None and parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("optimize", ["none", "auto"])
def test_a_faster_copy_is_one_of_the_gradient_model(trained, optimize):
    model, images, labels = trained
    options = {"gradient_model": model, "eps": 0.12, "generator": torch.Generator().manual_seed(0)}
    result = OrthoPGD(Flattened(model), optimize=optimize, **options).run(images, labels)
    assert_judged(result, Flattened(model), images, labels)
    assert result.success.any()


def writes(images, draws):
    seen = images * 1.0
    images.data.fill_(0.25)
    return seen


class KeepsWhatItReturned:
    def __init__(self):
        self.last = None

    def __call__(self, images, draws):
        if self.last is not None:
            self.last.data.fill_(9.0)
        self.last = images * 1.0
        return self.last


@pytest.mark.parametrize("transform", [writes, KeepsWhatItReturned()])
def test_a_transform_that_writes_into_tensors_changes_nothing_but_its_own(trained, transform):
    model, images, labels = trained
    before = images.clone()
    result = PGD(model, eps=0.03, steps=3, random_start=False, transform=transform).run(images, labels)
    plain = PGD(model, eps=0.03, steps=3, random_start=False).run(images, labels)
    assert torch.equal(result.adversarials, plain.adversarials)
    assert torch.equal(images, before)
    assert_judged(result, model, images, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"transform": lambda x, _: x},
        {"gradient_model": lambda x: torch.stack([x.flatten(1).sum(1), x.flatten(1).mean(1)] * 2, 1)},
        {"on_step": lambda _: None},
    ],
)
def test_what_takes_part_cannot_change_the_model(trained, options):
    model, images, labels = trained
    ((name, inner),) = options.items()

    def changing(*given):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        return inner(*given)

    weight = model[0].weight.detach().clone()
    with pytest.raises(ModelChangedError, match=f"the {name.replace('_', ' ')}" if name != "on_step" else "on_step"):
        FGSM(model, **{name: changing}).run(images, labels)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": 3}, "transform must be a function; got int"),
        ({"on_step": "print"}, "on_step must be a function; got str"),
        ({"gradient_model": nn.Linear}, "it is a class, so make one first"),
    ],
)
def test_what_is_no_function_is_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        PGD(trained[0], **options)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x, _: x[:1], r"transform must return a batch of as many images, \(48, 3, 8, 8\); got torch.float32 of"),
        (lambda x, _: [x], "got list"),
        (lambda x, _: x.detach(), "no gradient with respect to the images"),
    ],
)
def test_what_is_no_transform_is_refused(trained, transform, message):
    model, images, labels = trained
    with pytest.raises(ValueError, match=message):
        FGSM(model, transform=transform).run(images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transform": lambda x, _: x * torch.nan},
            "^the transform, in a pass for gradients: .*NaN or infinite logits",
        ),
        ({"transform": lambda x, _: x[..., ::2]}, "^the transform, in a pass for gradients: .*input size"),
        ({"transform": lambda x, _: x.double()}, "^the transform, in a pass for gradients: .*should be the same"),
        ({"transform": lambda x, _: x.detach()}, r"^the transform has no gradient .* or leaves torch$"),
        ({"gradient_model": lambda x: x.flatten(1)[:, :1]}, "^gradient_model, in a pass for gradients: .*two logits"),
        ({"gradient_model": lambda x: x.flatten(1)[:, :2]}, "^gradient_model, in a pass .* the model has 2 classes"),
        ({"gradient_model": lambda x: x.flatten(1)[:, :4] / 0}, "^gradient_model, in a pass .* infinite logits"),
        ({"gradient_model": lambda x: x.detach().flatten(1)[:, :4]}, "^gradient_model has no gradient"),
        (
            {"transform": lambda x, _: x.detach(), "gradient_model": lambda x: x.flatten(1)[:, :4]},
            "^the transform of gradient_model has no gradient",
        ),
    ],
)
def test_a_fault_of_what_takes_the_models_place_is_not_called_the_models(trained, options, message):
    model, images, labels = trained
    with pytest.raises(ValueError, match=message):
        FGSM(model, **options).run(images, labels)


def test_memory_that_a_transform_lacks_is_said_as_such(trained):
    model, images, labels = trained

    def lacking(x, draws):
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match=r"^too large$"):
        FGSM(model, transform=lacking).run(images, labels)


def test_a_gradient_model_without_slope_is_named(trained):
    model, images, labels = trained
    with pytest.warns(UserWarning, match="^nothing could be climbed: the gradient_model's gradient is zero"):
        PGD(model, steps=2, gradient_model=lambda x: model(x) * 0).run(images, labels)


# --- on_step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PGD, OrthoAPGD, NIFGSM])
def test_a_callback_sees_every_scored_point_and_the_best_of_these_comes_back(trained, kind):
    model, images, labels = trained
    seen: list[ScoredStep] = []
    result = quick(kind, model, on_step=seen.append, loss="margin", eps=0.02).run(images, labels)
    assert [one.step for one in seen] == [0, 1, 2, 3, 4]
    assert all(torch.equal(one.index, torch.arange(48)) for one in seen)
    losses = torch.stack([one.loss for one in seen])
    torch.testing.assert_close(losses.amax(0), result.loss)  # of a faster copy, but for the last iterate's
    at = result.steps.unsqueeze(0)
    assert torch.equal(torch.stack([one.norm for one in seen]).gather(0, at)[0], result.norm)
    assert torch.equal(torch.stack([one.success for one in seen]).any(0), result.success)
    assert all(torch.equal(one.margin, one.loss) for one in seen)


def test_a_callback_is_told_who_is_left_and_gets_copies(trained):
    model, images, labels = trained
    seen: list[torch.Tensor] = []

    def spoiling(step):
        seen.append(step.index.clone())
        for value in (step.index, step.success, step.loss, step.margin, step.norm):
            assert not value.requires_grad
            value.zero_()

    options = {"eps": 0.06, "steps": 4, "early_stop": True, "random_start": False}
    result = PGD(model, **options, on_step=spoiling).run(images, labels)
    plain = PGD(model, **options).run(images, labels)
    assert all(torch.equal(value, getattr(plain, name)) for name, value in vars(result).items())
    assert len(seen[-1]) < len(seen[0]) == 48
    for step, index in enumerate(seen):
        assert torch.equal(index, (~(result.success & (result.steps < step))).nonzero().squeeze(1))


def test_what_a_callback_raises_ends_the_attack_with_its_own_traceback(trained):
    model, images, labels = trained

    def stopping(step):
        if step.step == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough") as error:
        PGD(model, steps=5, on_step=stopping).run(images, labels)
    assert "stopping" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]


# --- chains -------------------------------------------------------------------------------------------------------


class Recording:
    """A link that notes what it is given."""

    def __init__(self):
        self.seen = []

    def init(self, ascent, points):
        return {"count": torch.zeros(len(points))}

    def update(self, state, direction, at):
        self.seen.append((state["count"].clone(), direction.clone(), at.step, len(at.points)))
        return direction, {"count": state["count"] + 1}


def climbing(model, *links, eps=0.05, steps=3, **options):
    return Attack(model, "linf", eps, Climb(chain(*links), steps, rate=0.5), **options)


def test_links_pass_the_direction_on_and_keep_a_row_per_sample(trained):
    model, images, labels = trained
    first, second = Recording(), Recording()
    climbing(model, first, normalize("linf"), second, early_stop=True).run(images, labels)
    assert [len(seen[0]) for seen in first.seen] == [seen[3] for seen in first.seen]
    assert first.seen[-1][3] < 48
    for (count, raw, step, _), (_, scaled, *_) in zip(first.seen, second.seen, strict=True):
        assert count.tolist() == [step] * len(count)
        largest = raw.abs().amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(scaled, raw / largest)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_normalized_directions_have_the_norm_of_ones(trained, norm):
    model, images, labels = trained
    after = Recording()
    climbing(model, normalize(norm), after).run(images, labels)
    size = perturbation_norm(after.seen[0][1].double(), norm)
    torch.testing.assert_close(size, perturbation_norm(torch.ones_like(images).double(), norm), rtol=1e-5, atol=0)


def test_momentum_sums_with_decay(trained):
    model, images, labels = trained
    before, after = Recording(), Recording()
    climbing(model, before, momentum(0.5), after).run(images, labels)
    expected = torch.zeros_like(images)
    for (_, given, *_), (_, found, *_) in zip(before.seen, after.seen, strict=True):
        expected = 0.5 * expected + given
        torch.testing.assert_close(found, expected)


def test_smoothing_is_a_convolution_of_each_channel(trained):
    model, images, labels = trained
    before, after = Recording(), Recording()
    kernel = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    climbing(model, before, smooth(kernel), after).run(images, labels)
    given, found = functional.pad(before.seen[0][1], (1, 1, 1, 1)), after.seen[0][1]
    expected = given[..., :-2, :-2] + 2 * given[..., :-2, 1:-1] + 3 * given[..., 1:-1, 1:-1] + 4 * given[..., 2:, 2:]
    torch.testing.assert_close(found, expected)
    assert torch.equal(smooth(torch.tensor([1.0, 2.0, 1.0])).kernel, torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))


def test_variance_tunes_by_the_mean_of_the_neighbours_before(trained):
    inner, images, labels = trained
    asked = []

    def model(x):
        asked.append(x.detach().clone())
        return inner(x)

    before, after = Recording(), Recording()
    result = climbing(model, before, variance(2, reach=0.8), after, loss="ce").run(images, labels, seeds=range(48))
    asked = [x for x in asked if len(x) == 48]  # without the looks at whether the model draws
    around = [asked[1:3], asked[4:6]]  # the neighbours of the first two iterates; the last gradient needs none
    for t, neighbours in enumerate(around):
        at = asked[3 * t]
        mean = torch.zeros_like(images)
        for points in neighbours:
            assert (points - at).abs().max() <= 0.8 * 0.05 * (1 + 1e-5)
            assert (points - at).abs().max() > 0.7 * 0.05
            x = points.clone().requires_grad_()
            functional.cross_entropy(inner(x), labels, reduction="sum").backward()
            mean += x.grad / 2
        expected = before.seen[t + 1][1] + mean - before.seen[t][1]
        torch.testing.assert_close(after.seen[t + 1][1], expected, rtol=1e-3, atol=1e-6)
    assert result.gradient_calls.tolist() == [3 + 2 * 2] * 48
    assert result.forward_calls.tolist() == [4 + 2 * 2] * 48


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: chain(schedule="steps"), "schedule must be one of"),
        (lambda: chain("momentum"), r"a link must have init and update, as momentum\(1.0\) has; got 'momentum'"),
        (lambda: normalize("l0"), "norm must be one of"),
        (lambda: momentum(-1), "decay must be a finite number >= 0; got -1"),
        (lambda: smooth(torch.ones(2, 3)), r"kernel must be a tensor \(k, k\) or \(k,\) of odd k"),
        (lambda: variance(0), "samples must be an integer >= 1; got 0"),
    ],
)
def test_links_that_make_no_sense_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


# --- subclasses ---------------------------------------------------------------------------------------------------


class Longer(MIFGSM, steps=7, loss="margin"):
    """Differs in defaults alone."""


class OrthoLonger(Longer, scope="image"):
    """And its orthogonal form."""


class Bare(Attack, early_stop=True):
    """With a constructor that passes on what it does not know."""

    def __init__(self, model, norm="linf", eps=0.03, **options):
        super().__init__(model, norm, eps, Climb(chain(), 2, rate=0.5), **options)


def test_a_subclass_may_differ_in_defaults_alone(trained):
    model, images, labels = trained
    assert torch.equal(Longer(model)(images, labels), MIFGSM(model, steps=7, loss="margin")(images, labels))
    assert (Longer(model).steps, Longer(model, steps=2).steps, OrthoLonger(model).scope) == (7, 2, "image")
    assert OrthoLonger(model).card.family == Longer(model).card.family == "MIFGSM"
    assert OrthoLonger(model).replace(eps=0.1).loss == "margin"
    assert OrthoLonger(model, eps=0.05).run(images, labels).cosine.max() <= 1e-6
    assert (Bare(model).early_stop, Bare(model, early_stop=False).early_stop, Bare(model).card.family) == (
        True, False, "Bare",
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"Bare got an unexpected keyword argument 'epsilon'; did you mean eps\?"):
        Bare(model, epsilon=3)
    with pytest.raises(TypeError, match="Typo has no option 'step' to give a default; did you mean steps"):
        type("Typo", (PGD,), {}, step=3)


def test_an_orthogonal_form_is_its_plain_one_with_another_default(trained):
    model, images, labels = trained
    for plain, ortho in ((PGD, OrthoPGD), (APGD, OrthoAPGD), (FGSM, OrthoFGSM)):
        draw = [torch.Generator().manual_seed(2) for _ in range(2)]
        one = quick(plain, model, scope="image", generator=draw[0]).run(images, labels)
        two = quick(ortho, model, generator=draw[1]).run(images, labels)
        assert all(torch.equal(value, getattr(two, name)) for name, value in vars(one).items())


# --- the four proofs ----------------------------------------------------------------------------------------------


def make(name, model, norm="linf", **options):
    fixed = {} if name == "FMN" else {"eps": RADII[norm], "steps": 5}
    return PROOFS[name](model, norm=norm, **{**fixed, **options})


@norms
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", [None, "image"])
def test_the_verdicts_of_the_proofs_are_the_models_own(trained, name, norm, scope):
    model, images, labels = trained
    result = make(name, model, norm, scope=scope, **({"steps": 20} if name == "FMN" else {})).run(images, labels)
    assert torch.equal(result.success, fooled(model, result.adversarials, labels))
    assert result.success.sum() > 4
    delta = result.adversarials.double() - images.double()
    torch.testing.assert_close(result.norm, perturbation_norm(delta, norm))
    if scope == "image":
        assert result.cosine.max() <= 1e-6
    if name != "FMN":
        assert result.norm.max() <= RADII[norm] * (1 + 1e-6)


def test_each_proof_has_at_most_25_lines():
    text = EXAMPLE.read_text(encoding="utf-8").partition("def main(")[0]
    pieces = re.split(r"^# .*arXiv.*\n", text, flags=re.M)[1:]
    lines = [sum(bool(line.strip()) for line in piece.splitlines()) for piece in pieces]
    assert len(lines) == 4
    assert max(lines) <= 25
    # Public names alone: none begins with an underscore.
    assert not re.search(r"\b_[a-z]\w*", re.sub(r"__\w+__", "", text))


def test_an_image_that_is_neither_shrunk_nor_moved_stays(trained):
    _, images, _ = trained

    class Middle:
        def uniform(self, *shape):
            return torch.full((len(images), *shape), 0.5)

    torch.testing.assert_close(PROOFS["resized_and_padded"](images, Middle(), smallest=1.0), images, rtol=0, atol=1e-5)
    smaller = PROOFS["resized_and_padded"](images, Middle(), smallest=0.5)
    assert smaller[..., 0, :].abs().max() == 0
    assert smaller[..., 3:5, 3:5].min() > 0


# --- minimal ------------------------------------------------------------------------------------------------------


@norms
def test_the_fast_minimum_norm_attack_is_as_good_as_foolboxs(trained, norm):
    model, images, labels = trained
    theirs = {
        "linf": foolbox.attacks.LInfFMNAttack,
        "l2": foolbox.attacks.L2FMNAttack,
        "l1": foolbox.attacks.L1FMNAttack,
    }
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    found, _, success = theirs[norm](steps=60)(fmodel, images, labels, epsilons=None)
    other = perturbation_norm(found.double() - images.double(), norm)
    result = PROOFS["FMN"](model, norm=norm, steps=60).run(images, labels)
    assert result.success.all()
    both = success & (other > 0)
    assert result.norm[both].log().mean() <= other[both].log().mean() + 0.01


@norms
def test_a_minimal_search_keeps_the_smallest_point_that_fools_and_counts_its_calls(trained, norm):
    model, images, labels = trained
    seen: list[ScoredStep] = []
    attack = PROOFS["FMN"](model, norm=norm, steps=25, on_step=seen.append)
    result = attack.run(images, labels)
    norms_, wins = torch.stack([s.norm for s in seen]), torch.stack([s.success for s in seen])
    smallest = torch.where(wins, norms_, torch.inf).amin(0)
    assert torch.equal(result.success, wins.any(0))
    torch.testing.assert_close(result.norm[result.success], smallest[result.success], rtol=1e-6, atol=1e-9)
    assert result.forward_calls.tolist() == [26] * 48
    assert result.gradient_calls.tolist() == [25] * 48
    with torch.no_grad():
        logits = model(result.adversarials)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(result.loss, others - logits.gather(1, labels[:, None])[:, 0])
    assert attack.card.minimal
    assert attack.eps is None
    assert "eps=None" in repr(attack)
    with pytest.raises(ValueError, match="FMN looks for the smallest norm itself"):
        Bisection(attack)


def test_a_minimal_search_in_a_ball_stays_there(trained):
    model, images, labels = trained
    result = PROOFS["FMN"](model, eps=0.02, steps=20).run(images, labels)
    assert result.norm.max() <= 0.02 * (1 + 1e-6)
    assert torch.equal(result.success, fooled(model, result.adversarials, labels))


def test_only_a_minimal_search_goes_without_a_radius(trained):
    with pytest.raises(ValueError, match="eps must be a radius in pixel units"):
        PGD(trained[0], eps=None)


# --- what is no link, no search -----------------------------------------------------------------------------------


class Returning(Recording):
    """A link that returns what it is told to."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def update(self, state, direction, at):
        return self.made(state, direction)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda s, d: (d * torch.nan, s), "Returning.update returned NaN or infinity"),
        (lambda s, d: (d / 0, s), "Returning.update returned NaN or infinity"),
        (lambda s, d: (d[:1], s), r"must return a direction of shape \(48, 3, 8, 8\); got \(1, 3, 8, 8\)"),
        (lambda s, d: (None, s), r"must return a direction of shape \(48, 3, 8, 8\); got NoneType"),
        (lambda s, d: d, "must return a direction and a dict of what to remember; got Tensor"),
        (lambda s, d: (d, {"t": torch.tensor(1.0)}), "must remember tensors with one row per sample; 't' is none"),
        (lambda s, d: (d, {"t": [1]}), "must remember tensors with one row per sample; 't' is none"),
    ],
)
def test_what_a_link_must_not_return_is_named(trained, made, message):
    model, images, labels = trained
    with pytest.raises(ValueError, match=message):
        climbing(model, Returning(made)).run(images, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(chain(momentum())), r"a chain is no link: give its links"),
        (lambda: smooth(torch.full((3, 3), torch.nan)), "kernel must be finite and not all 0"),
        (lambda: smooth(torch.zeros(3)), "kernel must be finite and not all 0"),
        (lambda: Attack(nn.Flatten(), "linf", 0.1, None), "search must have options, merit and be callable"),
        (lambda: Attack(nn.Flatten(), "linf", 0.1, lambda task, start: None), "search must have options, merit and be"),
        (
            lambda: Attack(nn.Flatten(), "linf", 0.1, Writing("size")),
            "search.merit must be one of 'loss', 'margin', 'n",
        ),
    ],
)
def test_what_is_no_part_of_an_attack_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_numbers_in_links_and_searches_too(trained):
    model, images, labels = trained
    links = momentum(np.float32(0.5)), variance(np.int64(2), np.float32(1.5))
    found = climbing(model, *links, steps=np.int64(3)).run(images, labels, seeds=range(48))
    plain = climbing(model, momentum(0.5), variance(2, 1.5), steps=3).run(images, labels, seeds=range(48))
    assert found == plain


class Writing:
    """A search that writes into whatever its task holds."""

    def __init__(self, merit="norm"):
        self.merit = merit

    def options(self, eps):
        return {}

    def __call__(self, task, start):
        task.best.images.copy_(task.best.adversarials.fill_(0.5))
        task.region.images.fill_(0.5)
        task.best.success[:] = task.best.exact[:] = True


def test_a_search_that_writes_everywhere_is_measured_from_the_images(trained):
    model, images, labels = trained
    result = Attack(model, "linf", None, Writing()).run(images, labels)
    assert_judged(result, model, images, labels)
    assert result.norm.min() > 0.1


def test_a_search_without_a_radius_is_not_said_to_have_no_room(trained):
    model, images, _ = trained
    still = Attack(model, "l2", None, Climb(chain(), 1, alpha=0.0, merit="norm"))
    assert still.run(images, model(images).argmax(1)).norm.max() == 0
