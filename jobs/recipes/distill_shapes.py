"""Stage 1 on coloured shapes, in a minute on two cores: the encoder learns a teacher's embeddings.

    python -m jobs.recipes.toys shapes images
    python -m jobs.recipes.toys teacher images
    splatshard convert 'images/train/*.tar' splats/train --num-gaussians 24 --image-size 32 \\
        --teacher images/teacher
    splatshard train distill_shapes --set data.src=splats/train --set dst=run1
    splatshard train contrast_shapes --set data.src=splats/train --set dst=run2 \\
        --set init=run1

The teacher may be any CLIP whose vision tower is 64 wide; for another width set
model.encoder.width, here and in the second stage.

Expected: the loss, the squared distance of unit vectors, falls from about 2 (unrelated directions).
"""

from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig, StemConfig
from splatshard.schemas.train import CheckpointConfig, DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    stage="distill",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=64,
            layers=2,
            heads=4,
            tokens=16,
            stem=StemConfig(bands=4, hidden=64),
            resampler=ResamplerConfig(heads=4),
        ),
        embed_dim=32,
    ),
    data=DataConfig(src="splats/train", batch_size=128, workers=0),
    optim=OptimConfig(epochs=20, lr=2e-3, warmup_steps=30, weight_decay=0.1),
    checkpoint=CheckpointConfig(every=100),
    dst="run1",
)
