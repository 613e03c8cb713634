"""Captions as conditions: words that a model embeds itself, or features of a frozen text encoder."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit import files
from dyndit.errors import InputError, first_line
from dyndit.models.conditions import Conditioning, Described, Value

TOKENS, POOLED = "encoder_hidden_states", "pooled_projections"
"""Names of a caption's features: one vector per token, (B, S, D_text), and one vector in all, (B, D_pooled)."""

PAD = 0
"""The word that fills a caption up to its length. A caption of `PAD` alone is the null caption."""


@dataclass(frozen=True)
class Words:
    """Captions of a few known words, as numbers (B, length). Word i of the vocabulary has number i + 1.

    Example: with the vocabulary ("a", "three") and length 3, "A three" is [1, 2, 0]. prompts: captions that an
    evaluation takes in turn. dropout: share of captions that training replaces by the null caption.
    """

    vocabulary: tuple[str, ...]
    length: int
    prompts: tuple[str, ...] = ()
    dropout: float = 0.1

    @property
    def guided(self) -> bool:
        """Tell if training dropped captions, so that the null caption is known."""
        return self.dropout > 0

    def null(self, like: Tensor) -> Tensor:
        """See `ConditionType`.  like: (B, S) -> (B, S)."""
        _check_guided(self.guided)
        return torch.full_like(like, PAD)

    def dropped(self, condition: Tensor, generator: torch.Generator, share: float | None = None) -> Tensor:
        """See `ConditionType`.  condition: (B, S) -> (B, S)."""
        lost = torch.rand(len(condition), generator=generator) < (self.dropout if share is None else share)
        return torch.where(lost.to(condition.device)[:, None], PAD, condition) if self.guided else condition

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """See `ConditionType`.  captions -> captions."""
        for caption in _captions(values):
            words = words_of(caption)
            if unknown := [word for word in words if word not in self.vocabulary]:
                known = ", ".join(self.vocabulary)
                raise InputError(
                    f"--prompt {caption!r:.60}: unknown word {unknown[0]!r:.30}; expected words of {known}"
                )
            if not 1 <= len(words) <= self.length:
                raise InputError(f"--prompt {caption!r:.60}: {len(words)} words; expected 1 to {self.length}")
        return list(values)

    def of(self, values: Sequence[Value], device: torch.device | str = "cpu") -> Tensor:
        """See `ConditionType`.  captions -> (B, S)."""
        number = {word: i + 1 for i, word in enumerate(self.vocabulary)}
        rows = [[number[word] for word in words_of(caption)] for caption in _captions(self.plain(values))]
        return torch.tensor([row + [PAD] * (self.length - len(row)) for row in rows], device=device)

    def in_turn(self, num: int, first: int = 0) -> list[Value]:
        """See `ConditionType`."""
        return _in_turn(self.prompts or self.vocabulary, num, first)

    def values_of(self, pictures: Described) -> Sequence[Value]:
        """See `ConditionType`."""
        return pictures.captions

    def example(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """See `ConditionType`.  -> (rows, S)."""
        return torch.randint(1, len(self.vocabulary) + 1, (rows, self.length), generator=generator)


@dataclass(frozen=True)
class Encoded:
    """Captions as features of a frozen text encoder of `transformers`. See `TOKENS` and `POOLED` for the rows.

    folder: the encoder and its tokenizer; "" if the features come from elsewhere. fingerprint: hash of the folder's
    files. width, pooled_width, length: D_text, D_pooled and S. The null caption is the empty text.
    """

    folder: str
    fingerprint: str
    width: int
    pooled_width: int
    length: int
    prompts: tuple[str, ...] = ()
    dropout: float = 0.1

    @property
    def guided(self) -> bool:
        """Tell if training dropped captions, and the encoder of the null caption is there."""
        return self.dropout > 0 and bool(self.folder)

    def null(self, like: Conditioning) -> Conditioning:
        """See `ConditionType`."""
        _check_guided(self.guided)
        rows = self._features("")
        expanded = {name: value.to(like.rows[name]).expand_as(like.rows[name]) for name, value in rows.items()}
        return Conditioning({name: value.contiguous() for name, value in expanded.items()})

    def dropped(self, condition: Conditioning, generator: torch.Generator, share: float | None = None) -> Conditioning:
        """See `ConditionType`."""
        share = self.dropout if share is None else share
        lost = torch.rand(len(condition.rows[POOLED]), generator=generator) < share
        if not self.guided or not lost.any():
            return condition
        null = self.null(condition).rows
        mask = {name: lost.to(v.device).view(-1, *[1] * (v.ndim - 1)) for name, v in condition.rows.items()}
        return Conditioning({name: torch.where(mask[name], null[name], v) for name, v in condition.rows.items()})

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """See `ConditionType`.  captions -> captions."""
        if not self.folder:
            raise InputError("--prompt: this model takes features of a text encoder; expected one in its config")
        return list(_captions(values))

    def of(self, values: Sequence[Value], device: torch.device | str = "cpu") -> Conditioning:
        """See `ConditionType`. Each caption is encoded by itself, so its features depend on no other caption."""
        rows = [self._features(caption) for caption in _captions(self.plain(values))]
        return Conditioning({name: torch.cat([row[name] for row in rows]) for name in (TOKENS, POOLED)}).to(device)

    def in_turn(self, num: int, first: int = 0) -> list[Value]:
        """See `ConditionType`."""
        return _in_turn(self.prompts, num, first)

    def values_of(self, pictures: Described) -> Sequence[Value]:
        """See `ConditionType`."""
        return pictures.captions

    def example(self, rows: int, generator: torch.Generator | None = None) -> Conditioning:
        """See `ConditionType`. Random features of the encoder's shapes."""
        tokens = torch.randn(rows, self.length, self.width, generator=generator)
        return Conditioning({TOKENS: tokens, POOLED: torch.randn(rows, self.pooled_width, generator=generator)})

    def _features(self, caption: str) -> dict[str, Tensor]:
        return _encoded(self.folder, self.fingerprint, self.length, caption)


def words_of(caption: str) -> list[str]:
    """Split a caption into words, in lower case and without punctuation: "Number seven, bold" -> number seven bold."""
    return re.findall(r"[a-z0-9]+", caption.lower())


def encoder_condition(
    folder: str | Path, length: int = 0, prompts: tuple[str, ...] = (), dropout: float = 0.1
) -> Encoded:
    """Return the condition of captions under the text encoder in a folder.

    length: tokens of a caption, at most the tokenizer's limit (default: that limit, at most 77).

    Raises:
        InputError: the folder holds no text encoder that loads.
    """
    path = Path(folder).resolve()
    tokenizer, _ = _loaded(str(path), made_of := fingerprint(path))
    most = min(77, tokenizer.model_max_length)
    length = min(length or most, most)
    rows = _encoded(str(path), made_of, length, "")
    width, pooled = rows[TOKENS].shape[2], rows[POOLED].shape[1]
    return Encoded(str(path), made_of, width, pooled, length, prompts, dropout)


def fingerprint(folder: Path) -> str:
    """Hash the files of a text encoder: weights, config and tokenizer.

    Raises:
        InputError: it is no folder, or lacks weights in safetensors.
    """
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: holds no text encoder; expected config.json, *.safetensors and a tokenizer")
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt")]):
        digest.update(f"{path.name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=2)
def _loaded(folder: str, expected: str) -> tuple[Any, torch.nn.Module]:
    """Load the tokenizer and the encoder.

    Raises:
        InputError: the folder holds another encoder than expected, or one that does not load.
    """
    if (found := fingerprint(Path(folder))) != expected:
        raise InputError(f"{folder}: another text encoder (hash {found}); expected the model's own, {expected}")
    import transformers

    try:
        names = files.read_json(Path(folder) / "config.json").get("architectures") or [""]
        kind = getattr(transformers, str(names[0]), transformers.AutoModel)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # transformers passes on OSError, ValueError, KeyError, SafetensorError
        raise InputError(f"{folder}: holds no text encoder that loads ({first_line(error)})") from error
    return tokenizer, encoder.float().eval().requires_grad_(False)


@lru_cache(maxsize=4096)
def _encoded(folder: str, expected: str, length: int, caption: str) -> dict[str, Tensor]:
    """Encode one caption -> {TOKENS: (1, S, D_text), POOLED: (1, D_pooled)}.

    The pooled vector is the encoder's own (a projection, else its pooler), else the mean over the caption's tokens.
    """
    tokenizer, encoder = _loaded(folder, expected)
    call = tokenizer(caption, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        out = encoder(input_ids=call["input_ids"], attention_mask=call["attention_mask"])
    tokens = out.last_hidden_state
    mask = call["attention_mask"][..., None].to(tokens)
    pooled = next((out[name] for name in ("text_embeds", "pooler_output") if out.get(name) is not None), None)
    if pooled is None:
        pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
    return {TOKENS: tokens.clone(), POOLED: pooled.clone()}


def _captions(values: Sequence[Value]) -> list[str]:
    if numbers := [value for value in values if not isinstance(value, str)]:
        raise InputError(f"--class-labels {numbers[0]}: this model takes captions; expected --prompt")
    return [value for value in values if isinstance(value, str)]


def _in_turn(prompts: Sequence[str], num: int, first: int) -> list[Value]:
    if not prompts:
        raise InputError("--prompt: missing; this model has no prompts of its own")
    return [prompts[i % len(prompts)] for i in range(first, first + num)]


def _check_guided(guided: bool) -> None:
    if not guided:
        raise InputError("guidance: this model was trained without a null caption; expected a guidance scale of 1")
