"""Noise, offset, intensities and PSF differ from frame to frame, at c = 3: the default weights.

Command:   dscsnet train --config experiments/configs/varied_c3.py --workdir runs/varied_c3, and
           once more from its weights (--workdir runs/varied_c3b --set train.num_steps=4000
           --set optimiser.learning_rate=0.001
           --set train.init_weights=runs/varied_c3/weights.safetensors)
Device:    2 CPU cores, shared with other work; 2026-11-29
Wall time: 68 and 30 minutes, 1,152,000 and 512,000 frames (160-350 frames/s)
Score:     CSO-mAP 28.98 of the map by the reference rule (AP05 0.73, AP10 8.01, AP15 26.32,
           AP20 48.63, AP25 61.23; 28.03 after the first 896,000 frames) on 2,000 frames of the val
           split, 11 x 11 pixels, with noise, intensities and PSFs of sigma 0.4 to 1.0 as varied; a
           threshold of 50 counts misses the faintest targets. On csist alone 51.07 (52.93 with the
           weights before, of sigma 0.45 to 0.55).
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
