"""Stage 1 of GaussianVision (arXiv 2509.22615): stem and resampler learn the RGB teacher's CLS.

    splatshard convert 'data/*.tar' splats --nested 400,900,1600,3136 --teacher TEACHER
    torchrun --nproc-per-node 8 -m jobs.train jobs/recipes/distill_stage1.py \\
        --set data.src=splats --set init_clip=TEACHER --set dst=runs/stage1
    splatshard train distill_stage1 ...      on one device

TEACHER is the RGB CLIP, width 512 (open_clip's ViT-M-16, or a folder in transformers' layout): its
blocks are the student's too, and stay as they are. Published: MSE of the normalised embeddings, 2
epochs, the stem alone trained. The learning rate and all below it are unpublished.

Expected: not run here for want of a GPU and of the data. The loss begins near 2 (unrelated unit
vectors) and must fall; published is only that stage 2 does not converge without this.
"""

from splatshard.schemas.model import EncoderConfig, ModelConfig
from splatshard.schemas.train import DataConfig, OptimConfig, TrainConfig

config = TrainConfig(
    stage="distill",
    model=ModelConfig(encoder=EncoderConfig(tokens=196)),
    data=DataConfig(src="splats", num_gaussians=400, batch_size=1024, workers=6),
    optim=OptimConfig(
        epochs=2,
        lr=5e-4,
        warmup_steps=500,
        trainable=("vision.stem.*", "vision.resampler.*", "vision.class_embedding"),
    ),
    precision="bf16",
    dst="runs/stage1",
)
