"""DPO on LLaVA-1.5-7B with the RLAIF-V data, full tuning of projector and decoder, for a v5e-64 or larger.

    python launch/train.py --config configs/llava15_7b_dpo.py --config.model.path=DIR --config.data.path=FILE --workdir W
"""

from pathlib import Path

from mmalign_jax import config_files


def get_config():
    config = config_files.load(Path(__file__).with_name("base.py"))
    config.model.preset = "llava-1.5-7b"
    config.data.format = "rlaif_v"
    config.data.prefix_tokens = 704  # 576 image tokens and a prompt
    config.data.answer_tokens = 352
    config.data.on_long_row = "drop"
    config.data.buckets = 8  # a single shape costs about twice the work where answers vary as these do, see docs/speed.md
    # with many rows of text, config.data.packed = True in its place may cost less
    config.objective.name = "dpo"
    config.objective.beta = 0.1
    # RLAIF-V's full tuning: lr 5e-7, beta 0.1, cosine, warm-up 5 %
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.weight_decay = 0.01
    config.optimizer.moment_dtype = "bfloat16"
    config.train.batch_size = 64
    config.train.steps = 1300
    config.checkpoint.every = 200
    return config
