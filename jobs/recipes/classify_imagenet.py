"""ImageNet-1k on splats, from labels: ViT-B, 300 epochs.

    splatshard convert 'imagenet/train-*.tar' splats/train --nested 400,900,1600,3136
    torchrun --nproc-per-node 8 -m jobs.train jobs/recipes/classify_imagenet.py \\
        --set data.src=splats/train --set dst=runs/imagenet
    splatshard train classify_imagenet ...   on one device

Expected: not run here for want of a GPU and of the data. Published, for comparison (GViT, arXiv
2506.23532): 76.9 % top-1 from guided Gaussians, 78.7 % from patches.
"""

from splatshard.schemas.model import EncoderConfig, ModelConfig
from splatshard.schemas.train import AugmentConfig, DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    stage="classify",
    model=ModelConfig(
        encoder=EncoderConfig(width=768, layers=12, heads=12, tokens=196),
        num_classes=1000,
    ),
    data=DataConfig(src="splats/train", num_gaussians=400, batch_size=1024, workers=6),
    augment=AugmentConfig(
        crop_scale=(0.2, 1.0),
        flip=0.5,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        grayscale=0.1,
        dropout=0.1,
    ),
    optim=OptimConfig(
        epochs=300,
        lr=1e-3,
        warmup_steps=10_000,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        label_smoothing=0.1,
        ema=0.9999,
    ),
    precision="bf16",
    dst="runs/imagenet",
)
