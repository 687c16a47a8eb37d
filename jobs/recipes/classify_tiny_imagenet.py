"""Tiny-ImageNet on splats, 64 px, from labels.

    splatshard convert 'tiny-imagenet/train*' splats/train --num-gaussians 128 --image-size 64
    splatshard train classify_tiny_imagenet --set data.src=splats/train \\
        --set model.num_classes=100 --set dst=runs/tiny

model.num_classes is 200, or 100 for the half of it; 64 tokens are those of a ViT with 8 px patches.

Expected: not run whole here; benchmarks/accuracy.py compares this kind of model with RGB patches.
"""

from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig
from splatshard.schemas.train import AugmentConfig, DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    stage="classify",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=192, layers=9, heads=3, tokens=64, resampler=ResamplerConfig(heads=3)
        ),
        num_classes=200,
    ),
    data=DataConfig(src="splats/train", batch_size=256, workers=2),
    augment=AugmentConfig(
        height=64,
        width=64,
        crop_scale=(0.3, 1.0),
        flip=0.5,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        dropout=0.1,
    ),
    optim=OptimConfig(
        epochs=100, lr=1e-3, warmup_steps=1000, weight_decay=0.05, label_smoothing=0.1, ema=0.999
    ),
    precision="bf16",
    dst="runs/tiny",
)
