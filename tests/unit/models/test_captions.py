"""Captions: words that a model embeds, and features of a frozen text encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit.errors import InputError
from dyndit.models.captions import POOLED, TOKENS, Encoded, Words, encoder_condition
from dyndit.models.conditions import ClassLabels
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.mmdit import MMDiT, MMDiTConfig, with_text_encoder
from dyndit.sampling.sample import sample
from dyndit.storage import load as checkpoints
from support.models import TINY_MMDIT, randomise
from support.tiny_pipelines import clip, t5, tokenizer

WORDS = Words(("a", "three", "bold"), 4, ("a three", "three, bold"))


def test_captions_become_numbers() -> None:
    assert WORDS.of(["A three, bold!", "three"]).tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]
    assert WORDS.null(WORDS.of(["three"])).tolist() == [[0, 0, 0, 0]]
    assert WORDS.in_turn(3) == ["a three", "three, bold", "a three"]
    assert WORDS.example(5, torch.Generator().manual_seed(0)).shape == (5, 4)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a cat", "unknown word 'cat'; expected words of a, three, bold"),
        ("", "0 words; expected 1 to 4"),
        ("a a a a a", "5 words"),
        (3, "--class-labels 3: this model takes captions"),
    ],
)
def test_bad_captions_are_refused(caption: object, named: str) -> None:
    with pytest.raises(InputError, match=named):
        WORDS.of(["a three", caption])


def test_a_caption_to_a_model_of_classes_is_refused() -> None:
    with pytest.raises(InputError, match="--prompt 'a three': this model takes class labels, 0 to 9"):
        ClassLabels(10).of(["a three"])


def test_captions_are_dropped_at_the_rate_as_whole_rows() -> None:
    y = WORDS.of(["a three, bold"] * 20_000)
    dropped = WORDS.dropped(y, torch.Generator().manual_seed(1))
    lost = (dropped == 0).all(1)
    assert lost.float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[~lost], y[~lost])
    never, drawn = replace(WORDS, dropout=0.0), torch.Generator().manual_seed(1)
    assert torch.equal(never.dropped(y, drawn), y)
    with pytest.raises(InputError, match="null caption"):
        never.null(y)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_classes": 3}, "expected one of them"),
        ({"pooled_width": 8}, "pooled_width 8: expected text_width 16"),
        ({"image_size": 6}, "image_size 6"),
        ({"num_heads": 5}, "multiple of 4 and of num_heads"),
        ({"text_length": 0}, "text_length 0"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(TINY_MMDIT, **changes)


def test_the_order_of_words_matters(tmp_path: Path) -> None:
    backbone = MMDiT(TINY_MMDIT).eval()
    randomise(backbone, 0)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    with torch.no_grad():
        one, other = backbone(x[:1].repeat(2, 1, 1, 1), t, backbone.condition.of(["bold three", "three bold"]))
    assert (one - other).abs().max() > 1e-3
    renamed = MMDiT(replace(TINY_MMDIT, vocabulary=TINY_MMDIT.vocabulary[::-1]))
    renamed.load_state_dict(backbone.state_dict())
    assert renamed.identity() != backbone.identity()  # the same numbers stand for other words


# A frozen text encoder.


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    made = {"clip": (clip(projected=True), True), "t5": (t5(), False)}
    for name, (encoder, of_clip) in made.items():
        encoder.save_pretrained(folder / name)
        tokenizer(of_clip).save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture
def encoded(encoders: dict[str, Path]) -> MMDiTConfig:
    return with_text_encoder(TINY_MMDIT, encoder_condition(encoders["clip"]))


def test_features_are_the_encoders_own(encoders: dict[str, Path]) -> None:
    condition = encoder_condition(encoders["clip"])
    assert (condition.width, condition.pooled_width, condition.length) == (16, 12, 8)
    call = tokenizer(True)(["a red cat"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        own = clip(projected=True)(input_ids=call["input_ids"], attention_mask=call["attention_mask"])
    rows = condition.of(["a red cat"]).rows
    assert torch.equal(rows[TOKENS], own.last_hidden_state)
    assert torch.equal(rows[POOLED], own.text_embeds)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_features_depend_on_no_other_caption(encoders: dict[str, Path], name: str) -> None:
    condition = encoder_condition(encoders[name], length=5)
    both, alone = condition.of(["a red cat", "a moon"]), condition.of(["a moon"])
    assert torch.equal(both.rows[TOKENS][1:], alone.rows[TOKENS])
    assert torch.equal(both.rows[POOLED][1:], alone.rows[POOLED])
    assert both.rows[TOKENS].shape == (2, 5, condition.width)
    null = condition.null(both)
    assert torch.equal(null.rows[TOKENS][:1], condition.of([""]).rows[TOKENS])
    dropped = condition.dropped(both, torch.Generator().manual_seed(0), share=1.0)
    assert all(torch.equal(dropped.rows[part], null.rows[part]) for part in (TOKENS, POOLED))
    assert condition.dropped(both, torch.Generator().manual_seed(0), share=0.0) is both


def test_a_model_of_features_is_saved_and_draws(encoded: MMDiTConfig, tmp_path: Path) -> None:
    backbone = MMDiT(encoded).eval()
    randomise(backbone, 0)
    model = DynamicDepth(backbone).eval()
    checkpoints.save(model, tmp_path / "model")
    again = dyndit.load(tmp_path / "model")
    options = {"solver": "flow-euler", "num_steps": 2}
    pictures = sample(model, ["a red cat", "a moon"], **options).pictures
    assert torch.equal(sample(again, ["a red cat", "a moon"], **options).pictures, pictures)
    assert not torch.equal(pictures[0], sample(model, ["a moon", "a moon"], **options).pictures[0])
    assert sample(model, model.backbone.condition.in_turn(2), **options).labels == TINY_MMDIT.prompts


def test_another_encoder_in_the_folder_is_refused(encoded: MMDiTConfig, encoders: dict[str, Path]) -> None:
    condition = replace(encoded, text_encoder=str(encoders["t5"])).condition()
    with pytest.raises(InputError, match="another text encoder"):
        condition.of(["a moon"])
    for folder in ("nowhere", encoders["t5"].parent):
        with pytest.raises(InputError, match="holds no text encoder"):
            encoder_condition(folder)


def test_features_from_elsewhere_take_no_prompts() -> None:
    condition = replace(TINY_MMDIT, vocabulary=(), prompts=()).condition()
    assert isinstance(condition, Encoded)
    with pytest.raises(InputError, match="features of a text encoder"):
        condition.of(["a moon"])
    with pytest.raises(InputError, match="no prompts of its own"):
        condition.in_turn(1)
    rows = condition.example(2)
    assert not condition.guided
    assert condition.dropped(rows, torch.Generator(), share=1.0) is rows
    with pytest.raises(InputError, match="without a null caption"):
        condition.null(rows)
