"""csist at c = 3: the weights that are shipped in the package.

Trained on 7 x 7 frames: they hold a whole cluster with its surroundings at 40 % of the
cost of 11 x 11, and the network does not depend on the size of the frame. Evaluated on
11 x 11 frames.

Command:   dscsnet train --config experiments/configs/csist_c3.py --workdir runs/csist_c3
Device:    2 CPU cores, shared with other work; 2026-11-23
Wall time: 50 minutes, 1,408,000 frames (300-830 frames/s)
Score:     CSO-mAP 57.37 of the map by the reference rule (AP05 3.33, AP10 26.99, AP15 62.75,
           AP20 94.46, AP25 99.31) on 2,000 frames of the val split, 11 x 11 pixels
"""

from ml_collections import ConfigDict

from dscsnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.scene.frame_size = 7
    config.train.batch_size = 128
    config.train.num_steps = 11_000
    config.train.checkpoint_every = 500
    return config
