"""Every key at its default: the starting point of an experiment.

    deconstruct train --config=configs/base.py --workdir=runs/base --config.data=prepared --config.steps=1000

The keys and what they mean are in deconstruct/config.py.
"""

from deconstruct.config import default_config


def get_config():
    return default_config()
