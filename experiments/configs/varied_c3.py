"""Noise, offset, intensities and PSF differ from frame to frame, at c = 3: the default weights.

Command:   dscsnet train --config experiments/configs/varied_c3.py --workdir runs/varied_c3
Packaged:  the weights of commit 6c91753 and before, whose preset drew PSFs of sigma 0.45 to 0.55
           and whose network was not told which: CSO-mAP 33.09 of the map by the reference rule on
           2,000 frames of that preset's val split; 1,152,000 frames, 51 minutes on 2 CPU cores,
           2026-11-23. On csist 52.93 (experiments/benchmarks/map_score.py --num 2000 --weights
           dscsnet_jax/pretrained/varied_c3.safetensors; 2026-11-29).
Today's:   with sigma 0.4 to 1.0, told, 1,152,000 frames and then 512,000 more at a rate of 0.001
           (98 minutes on 2 CPU cores, 2026-11-29): 28.98 on its own val split, 51.07 on csist, and
           maps that hold some 0.65 of a quiet frame's energy: not packaged.
"""

from ml_collections import ConfigDict

from dscsnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.scene.preset = "csist_varied"
    config.scene.frame_size = 7
    config.network.normalise = "frame"
    config.train.batch_size = 128
    config.train.num_steps = 9_000
    config.train.checkpoint_every = 500
    return config
