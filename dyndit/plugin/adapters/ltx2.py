"""diffusers' `LTX2VideoTransformer3DModel`: LTX-2, video with sound (HaCohen et al. 2026, arXiv:2601.03233).

Every block runs on the tokens of the video and of the sound. Both leave at the same depth, each through a head of its
own. Latents are packed, (B, N, C) and (B, M, C). The adapter joins them to (B, N + M, C), video first, and so are its
predictions, which are velocities.

`timestep` tells the step: the scheduler's timestep, one per row. A model that is given frames gets a timestep per video
token; the largest is the step's. A guided call (`guidance_scale` above 1) stacks [unconditional; conditional]: the same
latents twice, the embedded negative prompt first. Spatio-temporal guidance (`stg_scale` above 0) and modality guidance
(`modality_scale` above 1) make further calls, which are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import pad

from dyndit.errors import InputError
from dyndit.models.base import Inputs, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, TableHead, attention_bias, shift_and_scale
from dyndit.process import RectifiedFlow

TIMES, VIDEO_TOKENS = "timestep_per_token", "num_video_tokens"


@dataclass(frozen=True)
class _State(State):
    """tokens, cond: of the video."""

    sound: Tensor
    """(B, M, D_sound)"""
    sound_cond: Tensor
    """(B, D_sound), or (B, M, D_sound) with a timestep per token."""
    constant: Mapping[str, Tensor | tuple[Tensor, Tensor] | None]
    """What all blocks take unchanged: text, modulation, positions, masks. Every tensor has the batch first."""

    def take(self, rows: slice | Tensor) -> Self:
        """Return the state of these rows of the batch, what all blocks take included."""

        def of(value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            if value is None:
                return None
            return tuple(part[rows] for part in value) if isinstance(value, tuple) else value[rows]

        return replace(super().take(rows), constant={name: of(value) for name, value in self.constant.items()})

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return tokens and conditioning of video, then sound: (B, N + M, D) each. Narrower ones end with zeros."""
        streams = ((self.tokens, self.cond), (self.sound, self.sound_cond))
        width = self.tokens.shape[-1]

        def wide(value: Tensor) -> Tensor:
            return pad(value, (0, width - value.shape[-1]))

        conds = [c if c.ndim == 3 else c[:, None].expand(-1, tokens.shape[1], -1) for tokens, c in streams]
        return torch.cat([wide(tokens) for tokens, _ in streams], dim=1), torch.cat([wide(c) for c in conds], dim=1)


class LTX2Adapter(Adapter):
    """The adapter of LTX-2: video and sound attend to each other in every block.

    Raises:
        InputError: latents of video and sound have different numbers of channels, or sound tokens are the wider ones.
    """

    family = "LTX2VideoTransformer3DModel"
    latents_arguments = ("hidden_states", "audio_hidden_states")
    row_arguments = (
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
        "encoder_attention_mask",
        "audio_encoder_attention_mask",
        "audio_timestep",
        "sigma",
        "audio_sigma",
        "video_coords",
        "audio_coords",
        "video_self_attention_mask",
        "video_keyframes_mask",
    )
    shared_arguments = ("num_frames", "height", "width", "fps", "audio_num_frames", "use_cross_timestep")
    guidance = "uncond first"
    timestep_per_token = True
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.out_channels, self.sample_shape = transformer.proj_out.out_features, (c.in_channels,)
        video = (c.in_channels, self.out_channels)
        sound = (c.audio_in_channels, transformer.audio_proj_out.out_features)
        if video != sound or transformer.audio_proj_out.in_features > self.width:
            raise InputError(f"{self.family}: channels {video} of video, {sound} of sound; expected the same of both")

    def _latents(self, call: dict[str, Any]) -> Tensor:
        """Return the latents of video, then sound: (B, N + M, C)."""
        return torch.cat([call["hidden_states"], call["audio_hidden_states"]], dim=1)

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Return the conditioning, with the number of video tokens and, if the call has them, their timesteps."""
        condition, times = super()._condition(call), call["timestep"]
        rows = dict(condition.rows)
        if isinstance(times, Tensor) and times.ndim == 2:
            rows[TIMES] = times
        return Conditioning(rows, {**condition.shared, VIDEO_TOKENS: call["hidden_states"].shape[1]})

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, N + M, C), t: (B,), y: prompt embeddings for video and sound (B, S, D_text), their masks (B, S),
        positions (B, 3, N, 2) and (B, 1, M, 2), sigma (B,), and a timestep per token, if the call has them.
        """
        model = self.transformer
        # As the call had them: linear maps in half precision round otherwise on slices of one tensor.
        video, sound = x[:, : y[VIDEO_TOKENS]].contiguous(), x[:, y[VIDEO_TOKENS] :].contiguous()
        tokens, sound_tokens = model.proj_in(video), model.audio_proj_in(sound)
        # diffusers 0.38 has neither this setting nor `use_prompt_adaln_single`.
        keyframes = model.config.get("use_keyframes_abs_pos_embedding", False)
        if keyframes and (mask := y["video_keyframes_mask"]) is not None:
            tokens = tokens + (mask > 0).to(tokens.dtype) * model.keyframes_abs_pos_embedding.to(tokens.dtype)
        modulation, (cond, sound_cond) = self._modulation(t, y, tokens.dtype)
        constant = self._text(y, x.dtype, len(x)) | self._positions(y, len(x), x.device) | modulation
        return _State(tokens, cond, sound_tokens, sound_cond, constant)

    def _modulation(
        self, t: Tensor, y: Conditioning, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor | None], tuple[Tensor, Tensor]]:
        """Embed the timesteps -> the blocks' modulation, and the heads' conditioning of video and sound."""
        model, config = self.transformer, self.transformer.config
        times = t if y[TIMES] is None else y[TIMES]
        sound_times = times if y["audio_timestep"] is None else y["audio_timestep"]
        sigma = y["sigma"]
        sound_sigma = sigma if y["audio_sigma"] is None else y["audio_sigma"]
        num = len(t)

        def embedded(embedder: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
            """-> modulation and embedding, (B, 1 or tokens, ...)."""
            made = embedder(values.flatten(), batch_size=num, hidden_dtype=dtype)
            return tuple(value.view(num, -1, value.shape[-1]) for value in made)

        (temb, cond), (temb_audio, sound_cond) = (
            embedded(model.time_embed, times),
            embedded(model.audio_time_embed, sound_times),
        )
        prompt = prompt_audio = None
        if model.prompt_modulation and config.get("use_prompt_adaln_single", True):
            prompt, _ = embedded(model.prompt_adaln, sigma)
            prompt_audio, _ = embedded(model.audio_prompt_adaln, sound_sigma)
        across, sound_across = (sound_sigma, sigma) if y["use_cross_timestep"] else (times, sound_times)
        factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
        modulation = {
            "temb": temb,
            "temb_audio": temb_audio,
            "temb_ca_scale_shift": embedded(model.av_cross_attn_video_scale_shift, across)[0],
            "temb_ca_audio_scale_shift": embedded(model.av_cross_attn_audio_scale_shift, sound_across)[0],
            "temb_ca_gate": embedded(model.av_cross_attn_video_a2v_gate, across * factor)[0],
            "temb_ca_audio_gate": embedded(model.av_cross_attn_audio_v2a_gate, sound_across * factor)[0],
            "temb_prompt": prompt,
            "temb_prompt_audio": prompt_audio,
        }
        own, beside = (c[:, 0] if c.shape[1] == 1 else c for c in (cond, sound_cond))
        return modulation, (own, beside)

    def _text(self, y: Conditioning, dtype: torch.dtype, num: int) -> dict[str, Tensor | None]:
        """Return the text of both streams, and all masks as biases on attention scores."""
        model, inside = self.transformer, y["video_self_attention_mask"]
        text, sound_text = y["encoder_hidden_states"], y["audio_encoder_hidden_states"]
        if model.config.use_prompt_embeddings:
            text = model.caption_projection(text).view(num, -1, self.width)
            sound_text = model.audio_caption_projection(sound_text)
            sound_text = sound_text.view(num, -1, sound_text.shape[-1])
        return {
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": sound_text,
            "encoder_attention_mask": attention_bias(y["encoder_attention_mask"], dtype),
            "audio_encoder_attention_mask": attention_bias(y["audio_encoder_attention_mask"], dtype),
            "self_attention_mask": None if inside is None else (1 - inside.to(dtype)) * -10000.0,
        }

    def _positions(self, y: Conditioning, num: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Return cosines and sines of the positions, for attention within and across streams."""
        model, video, sound = self.transformer, y["video_coords"], y["audio_coords"]
        if video is None:
            sizes = (y["num_frames"], y["height"], y["width"])
            video = model.rope.prepare_video_coords(num, *sizes, device, fps=24.0 if y["fps"] is None else y["fps"])
        if sound is None:
            sound = model.audio_rope.prepare_audio_coords(num, y["audio_num_frames"], device)
        return {
            "video_rotary_emb": model.rope(video, device=device),
            "audio_rotary_emb": model.audio_rope(sound, device=device),
            "ca_video_rotary_emb": model.cross_attn_rope(video[:, :1], device=device),
            "ca_audio_rotary_emb": model.cross_attn_audio_rope(sound[:, :1], device=device),
        }

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        tokens, sound = self.transformer.transformer_blocks[index](
            hidden_states=state.tokens,
            audio_hidden_states=state.sound,
            **state.constant,
            audio_self_attention_mask=None,
            a2v_cross_attention_mask=None,
            v2a_cross_attention_mask=None,
            use_a2v_cross_attention=True,
            use_v2a_cross_attention=True,
            perturbation_mask=None,
            all_perturbed=False,
        )
        return replace(state, tokens=tokens, sound=sound)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layers -> (B, N + M, C_out), video first."""
        model = self.transformer
        streams = (
            (state.tokens, state.cond, model.norm_out, model.scale_shift_table, model.proj_out),
            (state.sound, state.sound_cond, model.audio_norm_out, model.audio_scale_shift_table, model.audio_proj_out),
        )
        predictions = []
        for tokens, cond, norm, table, project in streams:
            shift, scale = shift_and_scale(table, cond)
            predictions.append(project(norm(tokens) * (1 + scale) + shift))
        return torch.cat(predictions, dim=1)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of both final layers."""
        model = self.transformer
        return _Head(
            TableHead(model.norm_out, model.scale_shift_table, model.proj_out),
            TableHead(model.audio_norm_out, model.audio_scale_shift_table, model.audio_proj_out),
        )

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Take each stream's own prediction.  (B, N + M, 2 C_out) -> (B, N + M, C_out)."""
        num, half = state.tokens.shape[1], patches.shape[-1] // 2
        return torch.cat([patches[:, :num, :half], patches[:, num:, half:]], dim=1)

    def output(self, prediction: Tensor, inputs: Inputs, return_dict: bool) -> BaseOutput | tuple[Tensor, Tensor]:
        """Split a prediction into video and sound."""
        given: Any = inputs.y
        num = given[VIDEO_TOKENS]
        video, sound = prediction[:, :num], prediction[:, num:]
        return AudioVisualModelOutput(sample=video, audio_sample=sound) if return_dict else (video, sound)


class _Head(nn.Module):
    """The final layers of video and sound, both on every token; `unpatchify` takes the right one."""

    def __init__(self, video: TableHead, sound: TableHead) -> None:
        super().__init__()
        self.video, self.sound = video, sound

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict.  tokens, cond: (B, N + M, D) -> (B, N + M, 2 C_out)."""
        narrow = self.sound.proj_out.in_features
        return torch.cat([self.video(tokens, cond), self.sound(tokens[..., :narrow], cond[..., :narrow])], dim=-1)
