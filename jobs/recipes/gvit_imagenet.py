"""ImageNet-1k by Gaussians learned with their classifier: ViT-B on 196 of them, 300 epochs.

    torchrun --nproc-per-node 8 -m jobs.train jobs/recipes/gvit_imagenet.py \\
        --set data.src='imagenet/train-*.tar' --set dst=runs/gvit
    splatshard train gvit_imagenet ...   on one device

Arms: unguided --set gvit.gamma=0, learned queries --set model.gvit.start=learned, grey
draws --set model.gvit.start=random. Offline fits are classify_imagenet.py with --set
model.encoder.resampler=None --set data.num_gaussians=196 on shards that were converted with
--num-gaussians 196; patches are the same recipe with --set model.encoder.input=patches --set
augment.dropout=0 --set data.num_gaussians=None on the images.

The predictor's size, the weights of the losses and the ramp are not published; these are ours.

Expected: not run here for want of a GPU and of the data. Published (GViT, arXiv 2506.23532): 76.9 %
top-1 guided, 73.6 % unguided, 78.7 % from patches.
"""

from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    StemConfig,
)
from splatshard.schemas.train import AugmentConfig, DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    stage="gvit",
    model=ModelConfig(
        encoder=EncoderConfig(
            width=768, layers=12, heads=12, stem=StemConfig.for_gvit(196), resampler=None
        ),
        num_classes=1000,
        gvit=GViTConfig(
            gaussians=196,
            predictor=EncoderConfig(input="patches", width=512, layers=6, heads=8),
        ),
    ),
    gvit=GViTLossConfig(),
    data=DataConfig(src="imagenet/train-*.tar", batch_size=1024, workers=12),
    augment=AugmentConfig(
        crop_scale=(0.2, 1.0),
        flip=0.5,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        grayscale=0.1,
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
    dst="runs/gvit",
)
