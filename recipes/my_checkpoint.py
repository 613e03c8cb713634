"""Your own checkpoint: exits, plans at three budgets, and what you would do instead, compared in one report.

    dyndit compare --model my-dit.pt --data DIR                        # this recipe
    dyndit compare my_checkpoint --model my-dit.pt --data DIR --extractor digits --num-images 120

DIR holds a subfolder of pictures per class. A model that brings exits and a shift table keeps them. Latents are decoded
by the autoencoder beside the model, or by `--vae`. The arms: full depth at five step counts, full depth without
guidance, and searched plans, all with the usual solver of the model's process.

The default extractor is Inception, whose weights torch-fidelity downloads. It has 2,048 features: a seed block needs
more pictures than that. A smaller extractor needs fewer: `--extractor`, `--num-images`. Copy this file to change more,
and give its path. The time depends on the model: ten arms draw five blocks of 2,500 pictures each.
"""

from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes import finetune_exits

experiment = Experiment(
    model="",
    data="",
    extractor="inception",
    distill=finetune_exits.distill,
    calibration=CalibrationSettings(batch_size=64),
    calibration_solver="",
    calibration_steps=10,
    solvers=(),
    full_steps=(5, 8, 10, 14, 20),
    dynamic_steps=(20,),
    budgets=(0.4, 0.55, 0.7),
    unguided_steps=(10, 20),
    margin=0.03,
    num_blocks=5,
    num_images=2_500,
    batch_size=50,
)
