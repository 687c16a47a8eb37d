"""Gaussians learned with their classifier, on scikit-learn's digits; and its other arms.

    python -m jobs.recipes.toys digits images
    splatshard train gvit_digits --set data.src='images/train/*.tar' --set dst=run
    splatshard evaluate run images/val

That is the guided arm. The others of arXiv 2506.23532's ablation, each with a dst of its own:

    unguided          splatshard train gvit_digits --set gvit.gamma=0
    learned queries   splatshard train gvit_digits --set model.gvit.start=learned
    from grey         splatshard train gvit_digits --set model.gvit.start=random
    offline fits      splatshard convert 'images/train/*.tar' splats/train --num-gaussians 24 \\
                          --image-size 32
                      splatshard train classify_digits \\
                          --set model.encoder.resampler=None --set data.src=splats/train
    patches           splatshard train classify_digits \\
                          --set model.encoder.input=patches --set model.encoder.image_size=32 \\
                          --set model.encoder.patch_size=4 --set model.encoder.tokens=64 \\
                          --set augment.dropout=0 --set data.src='images/train/*.tar'

The classifier's blocks, the steps and the augmentation are those of classify_digits.py.

Expected: 460 steps, 80 seconds of one core; gamma rises from step 23 to 92; loss 4.6 to 0.8; of the
300 digits in images/val 96.7 %, drawn with 21.6 dB: one seed. benchmarks/gvit.py compares the
arms.
"""

from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    StemConfig,
)
from splatshard.schemas.train import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    stage="gvit",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=64, layers=3, heads=4, stem=StemConfig.for_gvit(24, hidden=64), resampler=None
        ),
        num_classes=10,
        gvit=GViTConfig(
            gaussians=24,
            residual=1.0,
            predictor=EncoderConfig(
                input="patches",
                width=64,
                layers=2,
                heads=4,
                image_size=32,
                patch_size=4,
                tokens=64,
            ),
        ),
    ),
    gvit=GViTLossConfig(),
    data=DataConfig(src="images/train/*.tar", batch_size=64, workers=0),
    augment=AugmentConfig(height=32, width=32, rotation=8, zoom=(0.9, 1.1), shift=0.08),
    optim=OptimConfig(epochs=20, lr=2e-3, warmup_steps=40, weight_decay=0.05),
    checkpoint=CheckpointConfig(every=200),
    dst="run",
)
