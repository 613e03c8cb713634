"""Captioned digits: pictures that are what their captions say, and captions that a model knows."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dyndit.errors import InputError
from dyndit.models.captions import Words, words_of
from dyndit.models.conditions import ClassLabels
from dyndit.models.mmdit import MMDiT
from dyndit.training.captioned import ATTRIBUTES, NAMES, PROMPTS, STYLES, TEMPLATES, VOCABULARY, described, transformed
from dyndit.training.conditioned import as_condition, conditioned
from dyndit.training.data import check_fit, load_captioned_digits, load_digits, open_data
from support.models import TINY_MMDIT

DIGITS, CAPTIONED = load_digits(), load_captioned_digits()
WORDS = Words(VOCABULARY, 6, PROMPTS)


def test_they_are_the_scans_in_styles_by_number_alone() -> None:
    again = open_data("captioned-digits")
    assert len(CAPTIONED) == 4 * len(DIGITS) == len(CAPTIONED.captions)
    assert CAPTIONED.shape == (1, 8, 8)
    assert again.captions == CAPTIONED.captions
    assert torch.equal(again.uint8(), CAPTIONED.uint8())
    assert again.fingerprint == CAPTIONED.fingerprint != DIGITS.fingerprint
    plain = [i for i, caption in enumerate(CAPTIONED.captions) if not set(words_of(caption)) & set(ATTRIBUTES)]
    assert len(plain) > 800
    for i in plain[:50]:
        assert torch.equal(CAPTIONED[i][0], DIGITS[i % len(DIGITS)][0])
    x = torch.stack([CAPTIONED[i][0] for i in range(100)])
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), CAPTIONED.uint8(range(100)))


def test_every_caption_names_its_digit_and_styles_come_alike() -> None:
    names = [next(word for word in words_of(caption) if word in NAMES) for caption in CAPTIONED.captions]
    assert names == [NAMES[label] for label in CAPTIONED.labels]
    styles = [tuple(word for word in words_of(c) if word in ATTRIBUTES) for c in CAPTIONED.captions]
    shares = [styles.count(style) / len(styles) for style in STYLES]
    assert len(STYLES) == 8
    assert all(share == pytest.approx(1 / 8, abs=0.02) for share in shares)
    assert described(7, ("bold", "tilted"), TEMPLATES[2]) == "number seven, bold, tilted"


def moments(scan: np.ndarray) -> tuple[float, float, float]:
    """Ink, spread, and lean: the covariance of column and row. A stroke that leans right has a negative one."""
    rows, columns = np.mgrid[:8, :8]
    weight = scan / scan.sum()
    down, across = rows - (weight * rows).sum(), columns - (weight * columns).sum()
    return scan.sum(), (weight * (down**2 + across**2)).sum(), (weight * down * across).sum()


def test_bold_has_more_ink_tilted_leans_right_and_small_is_small() -> None:
    scans = [DIGITS._levels[i].numpy() for i in range(60)]
    for style, part, sign in (("bold", 0, 1), ("tilted", 2, -1), ("small", 1, -1)):
        changes = [moments(transformed(scan, (style,)))[part] - moments(scan)[part] for scan in scans]
        assert np.mean(np.sign(changes) == sign) > 0.9, style
        assert transformed(scans[0], (style,)).dtype == scans[0].dtype
        assert transformed(scans[0], (style,)).max() <= 16
    assert transformed(scans[0], ()) is scans[0]


def test_a_model_of_words_gets_the_words_of_the_captions() -> None:
    data = conditioned(CAPTIONED, WORDS)
    assert (len(data), data.fingerprint, data.can_flip) == (len(CAPTIONED), CAPTIONED.fingerprint, False)
    x, y = default_collate([data[i] for i in range(5)])
    assert torch.equal(x, torch.stack([CAPTIONED[i][0] for i in range(5)]))
    assert torch.equal(as_condition(y), WORDS.of(CAPTIONED.captions[:5]))
    assert conditioned(CAPTIONED, ClassLabels(10)) is CAPTIONED
    assert len(PROMPTS) == len(set(PROMPTS)) == 80
    assert WORDS.in_turn(3, 79) == [PROMPTS[79], PROMPTS[0], PROMPTS[1]]


def test_pictures_without_captions_are_captioned_by_their_classes() -> None:
    assert DIGITS.captions[:3] == ["0", "1", "2"]
    with pytest.raises(InputError, match="unknown word '0'"):
        check_fit(DIGITS, MMDiT(TINY_MMDIT))
