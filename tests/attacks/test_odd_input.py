"""Every attack with options, shapes, dtypes, memory layouts and values that nobody tries by hand.

What is valid gives adversarials that keep every promise, twice the same; what is not gives a ValueError that says so.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import orthattack
from orthattack import Bisection, OrthoPGD, alignment, fooled
from orthattack.attacks.configured import options_of
from tests.attacks.test_family import PLAIN, sizes
from tests.conftest import IMAGE_KINDS, examples, make_images

NAMES = [*PLAIN, *(f"Ortho{name}" for name in PLAIN), "Bisection"]
CLASSES = 3
LAYOUTS = [
    "contiguous",
    "channels_last",
    "transposed",
    "expanded",
    "sliced",
    "reversed rows",
    "requires grad",
    "inference",
]

VALID: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 3),
    "queries": st.integers(1, 6),
    "targets": st.integers(1, 2),
    "restarts": st.integers(1, 2),
    "alpha": st.sampled_from([None, 0.0, 1e-4, 0.01, 10.0]),
    "random_start": st.booleans(),
    "scope": st.sampled_from(["image", "channel", "pixel"]),
    "loss": st.sampled_from(["ce", "margin", "logit-difference"]),
    "early_stop": st.booleans(),
    "momentum": st.sampled_from([0.0, 0.5, 1.0]),
    "decay": st.sampled_from([0.5, 1.0]),
    "eot_samples": st.integers(1, 2),
    "enforce": st.sampled_from(["perturbation", "gradient"]),
    "reference": st.sampled_from(["clean"]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:eps=.* allows every image",  # which the largest radii do
    "ignore:the threat model leaves nothing but the image itself",  # of a pixel, or to the smallest radii
    "ignore:no random point fools the model",  # in which HopSkipJump begins
)

ODD = st.sampled_from([-1, 0, 1.5, math.nan, math.inf, 10**30, "one", None, (), [1], True])


def layout(images: Tensor, kind: str) -> Tensor:
    """The same numbers, otherwise in memory (expanded: those of the first image)."""
    if kind == "channels_last":
        return images.to(memory_format=torch.channels_last)
    if kind == "transposed":
        return images.mT.contiguous().mT
    if kind == "expanded":
        return images[:1].expand_as(images)
    if kind == "sliced":
        return torch.stack([images, images], dim=-1)[..., 0]
    if kind == "reversed rows":
        return torch.cat([images, images], dim=3)[..., images.shape[3] :]
    if kind == "requires grad":
        return images.clone().requires_grad_()
    if kind == "inference":
        with torch.inference_mode():
            return images.clone()
    return images.contiguous()


def network(channels: int, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, CLASSES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model.to(dtype).eval()


def make(name: str, model: nn.Module, norm: Any, eps: Any, options: dict[str, Any]) -> Any:
    if name == "Bisection":
        return Bisection(OrthoPGD(model, norm=norm, eps=eps, **options), trials=2)
    kind = getattr(orthattack, name)
    more = dict(options)
    if name not in ("FGSM", "OrthoFGSM"):  # which draw nothing
        more["generator"] = torch.Generator().manual_seed(0)
    return kind(model, norm=norm, eps=eps, **more)


@st.composite
def cases(draw: Any, name: str) -> tuple[Any, ...]:
    kind = OrthoPGD if name == "Bisection" else getattr(orthattack, name)
    known = [key for key in options_of(kind) if key in VALID]
    options = {key: draw(VALID[key]) for key in draw(st.lists(st.sampled_from(known), unique=True, max_size=4))}
    if "steps" in known:
        options.setdefault("steps", 2)
    if "queries" in known:
        options.setdefault("queries", 4)
    if "pairs" in options_of(kind):
        options |= {"pairs": 1, "queries": 3 + options["queries"]}  # one step at least
    shape = tuple(draw(st.integers(1, high)) for high in (3, 4, 7, 7))
    halves = [] if options.get("scope") == "pixel" else [torch.float16, torch.bfloat16]  # which is refused
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, *halves]))
    images = make_images(draw(st.sampled_from(IMAGE_KINDS)), shape, draw(st.integers(0, 99)), dtype)
    labels = torch.tensor(draw(st.lists(st.integers(0, CLASSES - 1), min_size=shape[0], max_size=shape[0])))
    norm = draw(st.sampled_from(kind.norms))
    eps = draw(st.sampled_from([0.0, 1e-6, 1 / 255, 8 / 255, 0.5, 1.0, 3.0, 1e6, *[5.0, 12.0] * (norm == "l0")]))
    return norm, eps, options, images, labels, draw(st.sampled_from(LAYOUTS))


def attacked(name: str, norm: Any, eps: Any, options: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    """Attack twice, and check all that is promised."""
    model = network(images.shape[1], images.dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, labels_before = images.detach().clone(), labels.clone()
    result = make(name, model, norm, eps, options).run(images, labels)
    found = result.adversarials
    assert torch.equal(images.detach(), before)
    assert torch.equal(labels, labels_before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    before = before.clamp(0, 1)  # what is off by round-off
    delta = found.double() - before.double()
    if name != "Bisection":
        assert eps is None or (sizes(delta, norm) <= eps * (1 + 1e-6)).all()
    scope = options.get("scope", "image")
    if name.startswith("Ortho") and options.get("enforce") != "gradient":
        limit = {torch.float32: 1e-6, torch.float64: 1e-12}.get(images.dtype)
        if limit is not None:
            assert alignment(delta, before.double(), scope).abs().max() <= limit
    assert result.norm.isfinite().all()
    with torch.no_grad():
        assert torch.equal(result.success, model(found).argmax(1) != labels)
    again = make(name, model, norm, eps, options).run(images, labels)
    assert torch.equal(again.adversarials, found)


@pytest.mark.parametrize("name", NAMES)
@examples(12)
@given(st.data())
def test_whatever_is_valid_keeps_every_promise(name, data):
    norm, eps, options, images, labels, kind = data.draw(cases(name))
    if name == "Bisection":
        eps = min(max(eps, 1e-3), 1.0)
    attacked(name, norm, eps, options, layout(images, kind), labels)


@pytest.mark.parametrize("name", NAMES)
@examples(12)
@given(st.data())
def test_whatever_is_odd_is_refused_or_keeps_every_promise(name, data):
    norm, eps, options, images, labels, kind = data.draw(cases(name))
    what = data.draw(st.sampled_from(["norm", "eps", "images", "labels", *options]))
    odd = data.draw(ODD)
    if what == "norm":
        norm = odd
    elif what == "eps":
        eps = odd
    elif what == "images":
        images = images.clone()
        values = [-1e-3, 1.001, 255.0, math.nan, math.inf, -math.inf, -0.0, math.nextafter(1, 2), 1e-45]
        images[0, 0, 0, 0] = data.draw(st.sampled_from(values))
    elif what == "labels":
        labels = labels + data.draw(st.sampled_from([-1, 1, CLASSES, 2**40, -(2**62)]))
    else:
        options[what] = odd
    try:
        attacked(name, norm, eps, options, layout(images, kind), labels)
    except ValueError as error:
        assert len(str(error)) > 12


MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, CLASSES))
IMAGES = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0])
ONE_PIXEL = IMAGES.clone().index_put_((torch.tensor(2), *torch.tensor([0, 3, 3])), torch.tensor(1.0001))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            ONE_PIXEL,
            LABELS,
            r"found min .*, max 1\.0001 \(sample 2\): they overshoot a little, .* images\.clamp\(0, 1\)$",
        ),
        (1.0001 * IMAGES.clamp(min=1), LABELS, r"they overshoot a little"),
        (
            1.27 * IMAGES - 0.14,
            LABELS,
            r"max 1\.1.*: they overshoot a little, as rounding or bicubic resizing makes them; clamp them",
        ),
        (2 * IMAGES - 1, LABELS, "they look normalised; pass them unnormalised"),
        ((IMAGES - 0.45) / 0.22, LABELS, "they look normalised; pass them unnormalised"),
        (255 * IMAGES, LABELS, r"they look 8-bit; divide them by 255, or pass bounds=\(0, 255\)"),
        (300 * IMAGES - 20, LABELS, "they look 8-bit"),
        (65535 * IMAGES, LABELS, "scale them to these bounds, or pass the bounds that the model takes"),
        ((255 * IMAGES).byte(), LABELS, "floating point; got torch.uint8: divide 8-bit images by 255"),
        (IMAGES + 0j, LABELS, "floating point; got torch.complex64: convert them to float32"),
        (IMAGES.numpy(), LABELS, "images must be a tensor; got ndarray: convert it with torch.as_tensor"),
        (list(IMAGES), LABELS, r"images must be a tensor; got list: join its tensors with torch\.stack"),
        (None, LABELS, "images must be a tensor; got NoneType"),
        (IMAGES[0], LABELS, r"a single image becomes a batch by images\.unsqueeze\(0\)"),
        (IMAGES.to_sparse(), LABELS, r"images must be dense; .*use \.to_dense\(\)"),
        (IMAGES.to("meta"), LABELS, r"images \(meta\) and labels \(cpu\) must be on the same device"),
        (torch.rand(4, 9, 9, 3), LABELS, r"which looks like \(N, H, W, C\): pass images\.permute\(0, 3, 1, 2\)"),
        (torch.rand(4, 9, 8, 3), LABELS, r"they look like \(N, H, W, C\): pass images\.permute\(0, 3, 1, 2\)"),
        (IMAGES[:, :1], LABELS, r"does not take images of shape \(4, 1, 6, 6\) .*are these its channels"),
        (torch.rand(4, 3, 9, 9), LABELS, r"does not take images of shape \(4, 3, 9, 9\) .*its image size"),
        (
            IMAGES.double(),
            LABELS,
            r"images are float64, the model's weights float32: pass images\.float\(\), or attack ",
        ),
        (IMAGES.half(), LABELS, r"images are float16, the model's weights float32: pass images\.float\(\)"),
        (
            IMAGES,
            LABELS - 1,
            r"labels must lie in \[0, 2\], .* found -1 \(sample 0\): leave out images without a label",
        ),
        (IMAGES, LABELS - 100, "found -100 .*leave out images without a label"),
        (IMAGES, LABELS[:1], r"labels must have shape \(4,\), one per image; got \(1,\)$"),
        (IMAGES, LABELS[:, None], r"got \(4, 1\): pass labels\.squeeze\(1\)"),
        (IMAGES, torch.eye(4, 3), r"got \(4, 3\): pass labels\.argmax\(1\) if they are one-hot"),
        (IMAGES, LABELS.float(), r"labels must be integers; got torch\.float32: pass labels\.long\(\)"),
        (IMAGES, LABELS.tolist(), "labels must be a tensor; got list"),
    ],
)
@pytest.mark.parametrize("ask", ["run", "fooled", "sweep", "Square"])
def test_odd_input_is_named_with_its_cause_and_a_remedy(images, labels, message, ask):
    def asked():
        if ask == "fooled":
            return fooled(MODEL, images, labels)
        if ask == "Square":
            return orthattack.Square(MODEL, queries=2)(images, labels)
        attack = OrthoPGD(MODEL, steps=1)
        return attack.run(images, labels) if ask == "run" else attack.sweep(images, labels, [0.1, 0.2])

    with pytest.raises(ValueError, match=message.replace("images", "(images|adversarials)")):
        asked()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("turned", [True, False])
def test_channels_that_come_last_are_seen_as_such(channels, turned):
    images = torch.rand(4, 6, 5, channels) if turned else torch.rand(4, channels, 6, 4)
    with pytest.raises(ValueError, match=r"does not take images of shape") as error:
        orthattack.PGD(network(5, torch.float32), steps=1)(images, LABELS)
    looks = turned == (channels != 2)
    assert ("look like (N, H, W, C): pass images.permute(0, 3, 1, 2)" in str(error.value)) == looks


def test_half_precision_models_are_told_from_their_images():
    half = network(3, torch.float16)
    with pytest.raises(
        ValueError,
        match=r"images are float32, the model's weights float16: attack model\.float\(\), or pass images\.half",
    ):
        orthattack.PGD(half, steps=1)(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, r"seeds must be one integer per image, such as range\(4\); got 0"),
        ({"seeds": [1, 2]}, "seeds must be one per image, 4; got 2"),
        ({"seeds": [1.0, 2.0, 3.0, 4.0]}, r"integers, each below 2\*\*63 in size; found 1\.0"),
        ({"seeds": [2**63] * 4}, "found 9223372036854775808"),
        ({"start": IMAGES.numpy()}, "start must be a tensor; got ndarray"),
        ({"start": IMAGES[:1]}, r"start must have the shape of images, \(4, 3, 6, 6\); got \(1, 3, 6, 6\)"),
        ({"start": (255 * IMAGES).byte()}, "start must be floating point, like images; got torch.uint8"),
        ({"start": IMAGES / 0}, "start must be finite"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1; got 2.0: write 2"),
        ({"eps": [0.1] * 4}, r"use torch\.tensor\(eps\)"),
    ],
)
def test_odd_arguments_of_a_call_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OrthoPGD(MODEL, steps=1).run(IMAGES, LABELS, **options)


def test_integers_of_a_model_that_casts_are_none_of_our_business():
    def casts(images: Tensor) -> Tensor:
        return MODEL(images.float())

    assert OrthoPGD(casts, steps=1)(IMAGES.double(), LABELS).dtype == torch.float64


@pytest.mark.parametrize("odd", [None, [1.0], IMAGES.numpy(), 3])
def test_the_core_takes_tensors_only(odd):
    for function in (orthattack.orthogonalize, alignment, orthattack.remove_directions):
        with pytest.raises(ValueError, match="must be a tensor; got "):
            function(IMAGES, odd)
        with pytest.raises(ValueError, match="must be a tensor; got "):
            function(odd, IMAGES[:, None])
    with pytest.raises(ValueError, match="directions must be a tensor; got "):
        orthattack.orthonormal_basis(odd)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("ask", ["attack", "smallest norm", "sweep", "fooled"])
def test_nested_and_quantized_tensors_are_refused(ask):
    model, images, labels = nn.Flatten(), torch.rand(4, 3, 1, 1), torch.tensor([0, 1, 2, 0])
    attack = OrthoPGD(model, steps=1)
    call = {
        "attack": attack.run,
        "smallest norm": Bisection(attack, trials=1).run,
        "sweep": lambda x, y: attack.sweep(x, y, [0.1]),
        "fooled": lambda x, y: fooled(model, x, y),
    }[ask]
    with pytest.raises(ValueError, match=r"images|adversarials must be an ordinary tensor; got a nested one"):
        call(torch.nested.nested_tensor(list(images)), labels)
    with pytest.raises(ValueError, match="labels must be an ordinary tensor; got a nested one"):
        call(images, torch.nested.nested_tensor([labels[:2].clone(), labels[2:].clone()]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_labels_of_any_integer_dtype_are_the_same_labels(dtype):
    model, images, labels = nn.Flatten(), torch.rand(6, 3, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(fooled(model, images, labels.to(dtype)), fooled(model, images, labels))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\], .* found 3 \(sample 1\)"):
        fooled(model, images, (labels + 2 * (labels == 1)).to(dtype))


@pytest.mark.parametrize("number", [0, 3])
def test_a_radius_too_few_is_named_by_the_smallest_norm_too(number):
    attack = OrthoPGD(nn.Flatten(), eps=torch.full((number,), 0.1), steps=1)
    with pytest.raises(ValueError, match=r"eps has 3 values for 4 images|must be larger than 0"):
        Bisection(attack).run(torch.rand(4, 3, 1, 1), torch.tensor([0, 1, 2, 0]))
