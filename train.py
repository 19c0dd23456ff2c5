"""Trains a model: python train.py fit --config configs/train/minimax-tiny.yaml (see --help)."""

import sys

from zoo.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
