"""The plain training loop of a latent diffusion model, with this package's DiT in the place of any other network.

    python -m dyndit.recipes.plain_accelerate_loop DIR VAE OUT

DIR holds a subfolder of pictures per class, VAE is the folder of a diffusers AutoencoderKL. OUT becomes a model folder
that every verb takes: `dyndit distill finetune_exits --model OUT ...`. Read it beside `dyndit.training.fit`, which adds
what a long run needs: averaged weights, checkpoints that resume bit for bit, and logs.

Measured: nothing yet; the loop is tested on a tiny autoencoder, in seconds.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from torch.utils.data import DataLoader

from dyndit.models.dit import DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import load as checkpoints
from dyndit.training.data import PictureFolder


def train(
    pictures: PictureFolder, vae_folder: str | Path, config: DiTConfig, num_epochs: int = 1, rate: float = 1e-4
) -> DynamicDepth:
    """Train a DiT on latents.

    config: with the latents' channels and size, and without a learned variance. rate: the learning rate.
    """
    accelerator = Accelerator()
    vae = AutoencoderKL.from_pretrained(vae_folder).to(accelerator.device).eval()
    scheduler = DDPMScheduler(num_train_timesteps=1000)  # the process that the package calls "ddpm"
    model = config.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    loader = DataLoader(pictures, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(num_epochs):
        for x, labels in loader:
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            lost = torch.rand(len(labels), device=labels.device) < config.label_dropout
            prediction = model(scheduler.add_noise(latents, noise, t), t, labels.masked_fill(lost, config.num_classes))
            loss = F.mse_loss(prediction, noise)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss of the last batch: {loss.item():.4f}")
    return DynamicDepth(accelerator.unwrap_model(model), pixel_space=False).eval()


def main(folder: str, vae_folder: str, out: str) -> None:
    """Train a small DiT on pictures of 256 pixels, and write it."""
    pictures = PictureFolder(folder, 256)
    config = DiTConfig(32, 4, 4, 384, 12, 6, num_classes=pictures.num_classes, learn_variance=False)
    checkpoints.save(train(pictures, vae_folder, config), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:4])
