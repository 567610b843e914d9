"""Operations against torchvision's v2 on photographs."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from data.augment.apply import CODES, NAMES, Operations, apply_singly, apply_together
from data.augment.geometry import Fill
from data.augment.policies import AutoAugment, ColorJitter, TrivialAugment
from tests.support.images import make_jpeg
from tests.support.paths import CIFAR

Changed = Callable[..., Tensor]  # an operation and its magnitude -> images (N, H, W, 3)

PHOTOGRAPHS, BLACK = 50, (0, 0, 0)


@lru_cache
def photographs() -> Tensor:
    """50 photographs, or images made on the spot where those are absent: uint8 (50, 53, 64, 3)."""
    images = []
    if CIFAR.is_file():
        with tarfile.open(CIFAR) as tar:
            files = (member for member in tar if member.name.endswith(".jpg"))
            for member, _ in zip(files, range(PHOTOGRAPHS), strict=False):
                with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]  # a file has one
                    images.append(np.asarray(image.convert("RGB").resize((64, 53))))
    for number in range(len(images), PHOTOGRAPHS):
        with Image.open(io.BytesIO(make_jpeg(53, 64, seed=number))) as image:
            images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images))


@pytest.fixture(params=["together", "singly"])
def changed(request: pytest.FixtureRequest) -> Changed:
    """Apply an operation to the photographs, or other images: by torch, as on a GPU, or by OpenCV, as on a CPU."""

    def change(name: str, magnitude: float, *, fill: Fill = BLACK, images: Tensor | None = None) -> Tensor:
        result = (photographs() if images is None else images).clone()
        shape = (len(result), 1)
        drawn = Operations(np.full(shape, CODES[name], np.int32), np.full(shape, magnitude, np.float32))
        if request.param == "together":
            apply_together(result, drawn, fill=fill)
        else:
            apply_singly(result.numpy(), drawn, fill=fill)
        return result

    return change


def difference(images: Tensor, planes: Tensor) -> int:
    """The largest difference in levels: (N, H, W, 3) and (N, 3, H, W)."""
    return int((images.int() - planes.permute(0, 2, 3, 1).int()).abs().max())


def affine(images: Tensor, **options: object) -> Tensor:
    unchanged = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return v2.affine(images, **{**unchanged, "interpolation": InterpolationMode.BILINEAR, **options})


def sheared(images: Tensor, slope: float, *, axis: int) -> Tensor:
    angles = [0.0, 0.0]
    angles[axis] = math.degrees(math.atan(slope))
    return affine(images, shear=angles, center=[0, 0])


FACTORS = [number / 20 for number in range(41)]
REFERENCES: dict[str, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    "brightness": (v2.adjust_brightness, FACTORS),
    "contrast": (v2.adjust_contrast, FACTORS),
    "saturation": (v2.adjust_saturation, FACTORS),
    "sharpness": (v2.adjust_sharpness, FACTORS),
    "posterize": (lambda images, bits: v2.posterize(images, int(bits)), [0, 2, 5, 8]),
    "solarize": (v2.solarize, [0, 100, 128.5, 255]),
    "invert": (lambda images, _: v2.invert(images), [0]),
    "autocontrast": (lambda images, _: v2.autocontrast(images), [0]),
    "equalize": (lambda images, _: v2.equalize(images), [0]),
    "hue": (v2.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.5]),
    "blur": (lambda images, sigma: v2.gaussian_blur(images, [17, 17], [sigma, sigma]), [0.1, 0.5, 2.0]),
    "shear_x": (lambda images, slope: sheared(images, slope, axis=0), [-0.9, 0.3]),
    "shear_y": (lambda images, slope: sheared(images, slope, axis=1), [-0.9, 0.3]),
    "translate_x": (lambda images, pixels: affine(images, translate=[int(pixels), 0]), [-9, 30]),
    "translate_y": (lambda images, pixels: affine(images, translate=[0, int(pixels)]), [-9, 30]),
    "rotate": (lambda images, degrees: v2.rotate(images, degrees, InterpolationMode.BILINEAR), [-135, 20, 90]),
}


BLENDS = ("brightness", "contrast", "saturation", "sharpness")


@pytest.mark.parametrize("name", REFERENCES)
def test_an_operation_is_torchvisions_within_a_level(changed: Changed, name: str) -> None:
    reference, magnitudes = REFERENCES[name]
    for magnitude in magnitudes:
        expected = reference(photographs().permute(0, 3, 1, 2), magnitude)
        assert difference(changed(name, magnitude), expected) <= 1, magnitude


def test_every_operation_has_a_reference() -> None:
    assert {*REFERENCES} == {*NAMES} - {"identity", "solarize_add"}  # torchvision has no solarize_add


def test_solarize_add_is_timms(changed: Changed) -> None:
    from timm.data.auto_augment import solarize_add

    for image, result in zip(photographs(), changed("solarize_add", 37), strict=True):
        assert np.array_equal(result.numpy(), np.asarray(solarize_add(Image.fromarray(image.numpy()), 37)))


def test_integer_operations_are_pillows_to_the_bit(changed: Changed) -> None:
    for image, equal, grey in zip(photographs(), changed("equalize", 0), changed("posterize", 3), strict=True):
        pillow = Image.fromarray(image.numpy())
        assert np.array_equal(equal.numpy(), np.asarray(ImageOps.equalize(pillow)))
        assert np.array_equal(grey.numpy(), np.asarray(ImageOps.posterize(pillow, 3)))


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "hue", "sharpness", "blur"])
def test_flat_and_tiny_images_stay_images(changed: Changed, name: str) -> None:
    for shape in ((2, 5, 5, 3), (2, 1, 1, 3), (2, 2, 7, 3)):
        flat = torch.full(shape, 77, dtype=torch.uint8)
        assert torch.equal(changed(name, 0.4, images=flat), flat)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_an_operation_of_no_effect_changes_nothing(changed: Changed, name: str) -> None:
    neutral = {"solarize": 256, "posterize": 8, **dict.fromkeys(BLENDS, 1)}.get(name, 0)
    if name not in ("invert", "autocontrast", "equalize", "blur"):
        assert torch.equal(changed(name, neutral), photographs())


def test_the_fill_comes_in_from_outside(changed: Changed) -> None:
    moved, fill = changed("translate_x", 20, fill=(10, 20, 30)), torch.tensor([10, 20, 30])
    assert torch.equal(moved[:, :, 20:], photographs()[:, :, :-20])
    assert bool((moved[:, :, :20] == fill).all())
    expected = v2.rotate(photographs().permute(0, 3, 1, 2), 45, InterpolationMode.BILINEAR, fill=[10.0, 20.0, 30.0])
    inside = v2.rotate(torch.ones(1, 1, 53, 64), 45, InterpolationMode.BILINEAR)  # torchvision weighs the border twice
    is_sure = ((inside == 0) | (inside == 1))[0, 0]
    found = changed("rotate", 45, fill=(10, 20, 30))
    assert difference(found[:, is_sure][:, None], expected[:, :, is_sure][:, :, None]) <= 1
    assert float(is_sure.float().mean()) > 0.9


@pytest.mark.parametrize("policy", [TrivialAugment(), AutoAugment(), ColorJitter(0.4, 0.4, 0.4, 0.1, 0.2, 0.5)])
def test_a_batch_does_not_change_its_images(policy: TrivialAugment) -> None:
    """To the bit, since other ranks have other batches; torch and OpenCV differ by a level in each operation."""
    numbers = np.arange(200)
    drawn = policy.draw(numbers, size=(53, 64), seed=3, epoch=1)
    images = photographs().repeat(4, 1, 1, 1)
    alone, together = images.clone(), images.clone()
    apply_singly(alone.numpy(), drawn, fill=BLACK)
    apply_together(together, drawn, fill=BLACK)
    differences = (alone.int() - together.int()).abs()
    if drawn.codes.shape[1] == 1:
        assert int(differences.max()) <= 2  # one more, the other less than torchvision's
    else:  # a second operation can enlarge what the first one leaves
        assert float((differences <= 2).float().mean()) > 0.99
    assert not torch.equal(alone, images)
    order = np.random.default_rng(0).permutation(200)
    shuffled = Operations(*(array[order] for array in drawn))
    again = images[order].contiguous()
    apply_together(again, shuffled, fill=BLACK)
    assert torch.equal(again, together[order])
    again = images[order].contiguous()
    apply_singly(again.numpy(), shuffled, fill=BLACK)
    assert torch.equal(again, alone[order])
