"""Noise, offset, intensities and PSF differ from frame to frame, at c = 3: the default weights.

Command:   dscsnet train --config experiments/configs/varied_c3.py --workdir runs/varied_c3
Device:    2 CPU cores, shared with other work; 2026-11-23
Wall time: 51 minutes, 1,152,000 frames (220-475 frames/s)
Score:     CSO-mAP 33.09 of the map by the reference rule (AP05 0.86, AP10 9.94, AP15 30.47,
           AP20 53.90, AP25 70.30) on 2,000 frames of the val split, 11 x 11 pixels, with noise
           and intensities as varied; a threshold of 50 counts misses the faintest targets.
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
