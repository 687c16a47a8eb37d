"""A CLIP of coloured shapes and their captions, in a minute on two cores (stage 2 alone).

    python -m jobs.recipes.toys shapes images
    splatshard convert 'images/train/*.tar' splats/train --num-gaussians 24 --image-size 32
    splatshard train contrast_shapes --set data.src=splats/train --set dst=run

Expected: 280 steps; loss 4.85 to about 1.8, not lower, since a batch of 128 has many equal
captions. Then of the 24 captions `a red disc` ... the nearest is right for all 200 pictures in
splats/val (made in the same way from images/val).
"""

from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.train import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    stage="contrast",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=64,
            layers=2,
            heads=4,
            tokens=16,
            stem=StemConfig(bands=4, hidden=64),
            resampler=ResamplerConfig(heads=4),
        ),
        text=TextConfig(
            width=64, layers=1, heads=4, vocab_size=17, context_length=8,
            tokenizer="images/tokenizer",
        ),
        embed_dim=32,
    ),
    data=DataConfig(src="splats/train", batch_size=128, workers=0),
    augment=AugmentConfig(height=32, width=32, flip=0.5, shift=0.1, zoom=(0.8, 1.2), dropout=0.1),
    optim=OptimConfig(epochs=40, lr=2e-3, warmup_steps=30, weight_decay=0.1),
    checkpoint=CheckpointConfig(every=100),
    dst="run",
)  # fmt: skip
