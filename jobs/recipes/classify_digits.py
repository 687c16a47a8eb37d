"""A classifier of scikit-learn's digits, in a minute on two cores.

    python -m jobs.recipes.toys digits images
    splatshard convert 'images/train/*.tar' splats/train --num-gaussians 24 --image-size 32
    splatshard train classify_digits --set data.src=splats/train --set dst=run

Expected: 460 steps; loss 2.30 to about 0.25, accuracy 0.94 on augmented training batches; 98.3 %
of the 300 digits in splats/val (made in the same way from images/val).
"""

from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig, StemConfig
from splatshard.schemas.train import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    stage="classify",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=64,
            layers=3,
            heads=4,
            tokens=16,
            stem=StemConfig(bands=4, hidden=64),
            resampler=ResamplerConfig(heads=4),
        ),
        num_classes=10,
    ),
    data=DataConfig(src="splats/train", batch_size=64, workers=0),
    augment=AugmentConfig(
        height=32, width=32, rotation=8, zoom=(0.9, 1.1), shift=0.08, dropout=0.1
    ),
    optim=OptimConfig(epochs=20, lr=2e-3, warmup_steps=40, weight_decay=0.05),
    checkpoint=CheckpointConfig(every=200),
    dst="run",
)
